"""How the Hub is reached: its address, a token or a password, the cache."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from medmim.errors import WeightsError


@dataclass(frozen=True)
class HubAccess:
    """How to reach the Hub; None leaves it to huggingface_hub (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`).

    The endpoint may have a password, as in https://user:password@server. The client is given it as a header, like a
    token, because an address gets into what the client logs and raises.
    """

    token: str | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    endpoint: str | None = field(default=None, repr=False)
    local_files_only: bool = False

    def __post_init__(self) -> None:
        # The HTTP library would refuse it too, with an error that quotes it.
        if isinstance(self.token, str) and not re.fullmatch(r"[!-~]*", self.token):
            raise WeightsError(
                "the token has a space, a line break or another character that no token has; copy it again, or leave "
                "token= out to use HF_TOKEN or that of `hf auth login`"
            )
        if self.endpoint:
            _split_login(self.endpoint)
        if isinstance(self.cache_dir, str | Path):  # the client does so when it downloads, not when it looks
            object.__setattr__(self, "cache_dir", Path(self.cache_dir).expanduser().absolute())

    def __getstate__(self) -> dict[str, Any]:
        # A model keeps where its decoder is; a file that it is pickled to must not have a secret.
        return {**self.__dict__, "token": None, "endpoint": self.endpoint and self.address}

    @property
    def address(self) -> str:
        """The endpoint that is asked, without user and password."""
        return self._endpoint[0]

    @property
    def headers(self) -> dict[str, str] | None:
        """What is sent to it with each request: user and password, where the endpoint has them."""
        login = self._endpoint[1]
        return None if login is None else {"authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}

    @property
    def _endpoint(self) -> tuple[str, str | None]:
        from huggingface_hub import constants

        return _split_login(self.endpoint or constants.ENDPOINT)

    @property
    def is_offline(self) -> bool:
        """Whether nothing may be asked."""
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE


def _split_login(endpoint: str) -> tuple[str, str | None]:
    """The address of a hub, and the "user:password" that stood in it.

    Raises:
        WeightsError: When it is no address; one that may have a password in it is not shown.
    """
    try:
        parts = urlsplit(endpoint) if isinstance(endpoint, str) and re.fullmatch(r"[!-~]+", endpoint) else None
        is_address = (
            parts is not None
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0  # one that is no number raises
            and not parts.query + parts.fragment
            and "@" not in parts.path
        )
    except ValueError:
        is_address = False
    if not is_address:
        shown = f" {str(endpoint)!r}" if re.fullmatch(r"[\w.:/-]*", str(endpoint)) else ""
        raise WeightsError(
            f"the endpoint{shown} is no address of a hub, such as https://hub.example.org/models; correct endpoint= or "
            "HF_ENDPOINT, and write /, @, ?, # and spaces of a password as %2F, %40, %3F, %23 and %20"
        )
    login, at, server = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{server}{parts.path}".rstrip("/"), unquote(login) if at else None
