"""How one file comes from the Hub: out of the cache or over the network, in several attempts, and why it did not come.

huggingface_hub transfers the file and keeps the cache. Two things it does not do are done here, of which the tests
write a table, `docs/reliability.md`. It waits 23 seconds for a server that is down, and minutes for one that hangs;
here a file that is not in the cache is asked for beforehand, and after PATIENCE seconds without an answer that is an
error. And it gives up at the first 5xx that comes instead of a large file's bytes; here there are ATTEMPTS.
"""

from __future__ import annotations

import base64
import errno
import re
import time
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from medmim import __version__
from medmim.errors import WeightsError

PATIENCE = 8.0  # seconds; HF_HUB_ETAG_TIMEOUT, when it is set, goes before it
ATTEMPTS = 4
COMMIT = re.compile(r"[0-9a-f]{40}")
PASSING = (408, 425, 429, 500, 502, 503, 504)  # status codes of a server that may do better in a moment


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


class PathInAnswer(ValueError):
    """A header that the client would name a file by leads out of the cache."""


class NoAnswer(Exception):
    """The server did not answer in time, or was not able to; the last reason is the cause."""


def download(repo: str, revision: str, name: str, access: HubAccess) -> Path | None:
    """The path of a file in the cache, downloaded when it was not there; None when the repository has none.

    A file of a commit that is cached costs no request, one of a branch or tag that is cached one.

    Raises:
        WeightsError: When it cannot be fetched, with the reason and the cure.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(repo, name, access.cache_dir, revision)
        if access.is_offline or COMMIT.fullmatch(revision):
            if cached is _CACHED_NO_EXIST:
                return None
            if isinstance(cached, str):  # hf_hub_download may ask the Hub what calls it, even then
                return Path(cached)
        return _in_attempts(repo, revision, name, access, is_cached=isinstance(cached, str))
    except WeightsError:
        raise
    # Whatever the client raises (its own errors, those of its HTTP library, OSError) means: it did not come.
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise WeightsError(explain(f"{name} of {repo}@{revision}", error, access)) from error


def _in_attempts(repo: str, revision: str, name: str, access: HubAccess, *, is_cached: bool) -> Path:
    from huggingface_hub import hf_hub_download, hf_hub_url

    _watch_answers()
    request: dict[str, Any] = {
        "token": access.token,
        "endpoint": access.address,
        "headers": access.headers,
        "library_name": "medmim",
        "library_version": __version__,
    }
    size = None
    for attempt in range(ATTEMPTS):
        if not is_cached and not access.is_offline:
            size = _await_answer(hf_hub_url(repo, name, revision=revision, endpoint=access.address), request)
        try:
            path = hf_hub_download(
                repo,
                name,
                revision=revision,
                cache_dir=access.cache_dir,
                etag_timeout=_patience(),
                local_files_only=access.local_files_only,
                tqdm_class=_bar_that_ends_at(size),
                **request,
            )
            return Path(path)
        except Exception as error:
            pause = None if _was_tried_again(error) else _pause_after(error, access.address, 2.0**attempt)
            if attempt + 1 == ATTEMPTS or pause is None or pause > _patience():
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _watch_answers() -> None:
    """Has every answer to a question about a file looked at before the client acts on it, and every request."""
    from huggingface_hub import get_session

    for kind, hook in (("request", _keep_password), ("response", _refuse_paths)):
        hooks = get_session().event_hooks[kind]
        if hook not in hooks:
            hooks.append(hook)


def _keep_password(request: Any) -> None:
    """Takes the password of a mirror off a request to the Hub, which a mirror may lead to: the client leaves it on."""
    is_password = request.headers.get("authorization", "").startswith("Basic ")
    if is_password and request.url.host.endswith("huggingface.co"):
        del request.headers["authorization"]


def _refuse_paths(response: Any) -> None:
    """The client calls files of its cache what these headers say, wherever that is and whatever is there.

    Raises:
        PathInAnswer: When it is outside of the cache.
    """
    if response.request.method != "HEAD":
        return
    for header in ("ETag", "X-Linked-Etag", "X-Repo-Commit"):
        value = response.headers.get(header, "")
        for text in (value, value.lstrip("W/").strip('"')):  # of an ETag the client takes these off
            path = PureWindowsPath(text)  # which may be written as one of other systems
            if path.anchor or ".." in path.parts:
                raise PathInAnswer(header)


def _bar_that_ends_at(size: int | None) -> type:
    """The client's progress bar, which stops a transfer that is longer than the file: one may have no end.

    Args:
        size: Bytes of the file; None for as many as the client was told to expect.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Over Xet what is counted are no bytes of the file, and hf_xet takes as many as it asked for.
            self.most = (size or kwargs.get("total")) if kwargs.get("name") == "huggingface_hub.http_get" else None
            self.received = kwargs.get("initial", 0)  # a bar that is not shown does not count
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            self.received += n
            if self.most is not None and self.received > self.most:
                raise OSError(f"the answer is longer than the file, which has {self.most} bytes")
            return super().update(n)

    return Bar


def _await_answer(url: str, request: dict[str, Any]) -> int | None:
    """Asks for a file until the server says that it is there, or is not.

    Returns:
        Its size in bytes, where the server says it.

    Raises:
        NoAnswer: When it says nothing, or that it cannot, until patience ends.
        Exception: Of the client, when it says something else.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import EntryNotFoundError

    end = time.monotonic() + _patience()
    pause = 0.5
    while True:
        try:
            return get_hf_file_metadata(url, timeout=end - time.monotonic(), **request).size
        except EntryNotFoundError:
            return None  # the client asks too, and makes a note of it in the cache
        except Exception as error:
            wait = _pause_after(error, url, pause)
            if wait is None:
                raise
            if time.monotonic() + wait >= end:
                raise NoAnswer from error
            time.sleep(wait)
            pause *= 2


def _patience() -> float:
    from huggingface_hub import constants

    told = constants.HF_HUB_ETAG_TIMEOUT
    return PATIENCE if told == constants.DEFAULT_ETAG_TIMEOUT else float(told)


def _pause_after(error: Exception, address: str, pause: float) -> float | None:
    """The seconds to wait before another attempt, `pause` or more; None when that would end in the same way."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        if error.response.status_code in PASSING:
            return max(pause, _asked_pause(error))
        # The CDN refuses a signed address that has run out; the next attempt gets a new one.
        is_expired = error.response.status_code == 403 and not _is_of(error.response, address)
        return pause if is_expired else None
    # hf_xet raises RuntimeError after attempts of its own; an OSError with a number is of this machine.
    final = (ValueError, RuntimeError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    if isinstance(error, final) or (isinstance(error, OSError) and error.errno is not None):
        return None
    return pause


def _was_tried_again(error: Exception) -> bool:
    """Whether the client has resumed such a transfer by itself, five times."""
    # Its HTTP library has changed twice, the names of its errors have not.
    return not {"ConnectError", "TimeoutException", "RemoteProtocolError"}.isdisjoint(
        ancestor.__name__ for ancestor in type(error).__mro__
    )


def _asked_pause(error: Exception) -> int:
    """The seconds that the server asks to wait."""
    value = error.response.headers.get("Retry-After", "")
    return int(value[:9]) if value.isdecimal() else 0  # thirty years will do


def _errno_of(error: Exception) -> int | None:
    """The number of an error of the operating system, which hf_xet has in its text only."""
    if isinstance(error, RuntimeError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return int(found[1])
    return error.errno if isinstance(error, OSError) else None


def _is_of(response: Any, address: str) -> bool:
    """Whether an answer is of the Hub, not of the CDN it led to."""
    origin = "/".join(address.split("/", 3)[:3])
    return str(response.url).startswith(origin)


def explain(what: str, error: Exception, access: HubAccess) -> str:
    """One sentence: what did not come, why, and what to do."""
    from huggingface_hub import errors

    what = f"{what} could not be fetched from {access.address}"
    # "Not in the cache" is what the client says when its question about the file failed: that is the cause.
    is_wrapped = isinstance(error, errors.LocalEntryNotFoundError | NoAnswer) and error.__cause__ is not None
    cause = error.__cause__ if is_wrapped else error
    response = cause.response if isinstance(cause, errors.HfHubHTTPError) else None
    status = response.status_code if response is not None else None
    said = response.headers.get("X-Error-Message", "") if response is not None else ""
    if isinstance(error, errors.HFValidationError):
        return f"{what}: no repository has such a name ({str(error).rstrip('.')}); check it"
    if isinstance(error, PathInAnswer):
        return f"{what}: {error} of the answer names a file outside of the cache; set HF_ENDPOINT to a hub you trust"
    if re.search(r"xet-\w+-token", str(error)):
        return f"{what}: the server does not speak Xet; set HF_HUB_DISABLE_XET=1"
    if isinstance(cause, errors.GatedRepoError):
        return f"{what}: it is gated; ask for access on its page, then set HF_TOKEN or pass token="
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{what}: there is no such revision; leave it out for the newest"
    if isinstance(cause, errors.DisabledRepoError):
        return f"{what}: the Hub has disabled the repository; set MEDMIM_HUB to a namespace or folder with a copy"
    if status == 401 and said.startswith("Invalid credentials"):
        return f"{what}: the token was refused, it may have expired; set HF_TOKEN to a new one, or unset it"
    if status in (401, 403, 404) and _is_of(response, access.address):
        return f"{what}: no such repository, or a private one; check the name, set HF_TOKEN or pass token="
    if status == 429:
        wait = _asked_pause(cause)
        return f"{what}: too many requests; try again {f'in {wait} seconds' if wait else 'later'}, or set HF_TOKEN"
    if access.is_offline:
        return (
            f"{what}: it is not in the cache and the network is off; fetch it once online (without HF_HUB_OFFLINE), or "
            "set MEDMIM_HUB to a local folder"
        )
    if isinstance(cause, errors.FileMetadataError):
        return (
            f"{what}: the answer is not that of a Hub, or a proxy takes off its headers (X-Repo-Commit, ETag); set "
            "HF_ENDPOINT to a Hub or a mirror, or MEDMIM_HUB to a local folder"
        )
    if _errno_of(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}: the disk is full; free space, or set HF_HOME or pass cache_dir="
    if _errno_of(error) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        place = getattr(error, "filename", None) or access.cache_dir or "HF_HOME"
        return f"{what}: the cache cannot be written ({place}); set HF_HOME or pass cache_dir="
    if isinstance(error, RuntimeError) and "CAS" in str(error):  # of hf_xet
        return f"{what}: the Xet storage failed ({str(error).partition(', domain:')[0]}); set HF_HUB_DISABLE_XET=1"
    reason = f"HTTP {status}" if status else f"{type(cause).__name__} {str(cause).partition(chr(10))[0]}"[:200]
    elsewhere = "set HF_ENDPOINT to a mirror or MEDMIM_HUB to a local folder"
    if isinstance(error, NoAnswer):
        waited = f"{_patience():.0f} seconds"
        return f"{what} in {waited} ({reason}); try again, wait longer by HF_HUB_ETAG_TIMEOUT=60, or {elsewhere}"
    return f"{what} ({reason}); try again, or {elsewhere}"
