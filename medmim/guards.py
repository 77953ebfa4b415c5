"""What a server may not do with the client of the Hub: name its files, learn a password, send without end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import PureWindowsPath
from typing import Any


class PathInAnswer(ValueError):
    """A header that the client would name a file by leads out of the cache."""


def watch_answers() -> None:
    """Has every answer to a question about a file looked at before the client acts on it, and every request.

    When a connection fails, huggingface_hub goes on with another HTTP client, which it makes then; so a server could
    get rid of what watches the first one.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http

    make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)  # which can be set in public, but not read
    if make is not None and getattr(make, "func", None) is not _make_watched:
        _http._GLOBAL_CLIENT_FACTORY = partial(_make_watched, make)
    _watch(get_session())


def _make_watched(make: Callable[[], Any]) -> Any:
    client = make()
    _watch(client)
    return client


def _watch(client: Any) -> None:
    for kind, hook in (("request", _keep_password), ("response", _refuse_paths)):
        if hook not in client.event_hooks[kind]:
            client.event_hooks[kind].insert(0, hook)  # before that of the client, which logs


def _keep_password(request: Any) -> None:
    """Takes a password off an address, which is logged, and off a request to the Hub, which a mirror may lead to.

    It is in the headers by now; the client asks `HF_ENDPOINT` as it is for what it wants to know itself.
    """
    request.url = request.url.copy_with(userinfo=b"")
    is_password = request.headers.get("authorization", "").startswith("Basic ")
    if is_password and request.url.host.endswith(("huggingface.co", "hf.co")):
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


def bar_that_ends_at(size: int | None) -> type:
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
