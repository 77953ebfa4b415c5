"""How one file comes from the Hub: out of the cache or over the network, in several attempts, and why it did not come.

huggingface_hub transfers the file and keeps the cache. Two things it does not do are done here, of which the tests
write a table, `docs/reliability.md`. It waits 23 seconds for a server that is down, and minutes for one that hangs;
here a file that is not in the cache is asked for beforehand, and after PATIENCE seconds without an answer that is an
error. And it gives up at the first 5xx that comes instead of a large file's bytes; here there are ATTEMPTS.
"""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path
from typing import Any

from medmim import __version__
from medmim.access import HubAccess
from medmim.errors import WeightsError
from medmim.guards import PathInAnswer, bar_that_ends_at, watch_answers

PATIENCE = 8.0  # seconds; HF_HUB_ETAG_TIMEOUT, when it is set, goes before it
ATTEMPTS = 4
COMMIT = re.compile(r"[0-9a-f]{40}")
PASSING = (408, 425, 429, 500, 502, 503, 504)  # status codes of a server that may do better in a moment


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

    watch_answers()
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
                tqdm_class=bar_that_ends_at(size),
                **request,
            )
            return Path(path)
        except Exception as error:
            pause = None if _was_tried_again(error) else _pause_after(error, access.address, 2.0**attempt)
            if attempt + 1 == ATTEMPTS or pause is None or pause > _patience():
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


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
