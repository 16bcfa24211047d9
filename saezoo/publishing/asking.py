"""What every request that writes to the Hub does: wait and ask again, but not for ever; turn each
refusal into one line of ours; and keep the token out of every text.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever this huggingface_hub is built on
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    disable_progress_bars,
    get_session,
    logging,
    parse_ratelimit_headers,
)

from saezoo.errors import (
    BadName,
    MissingFile,
    NoAccess,
    Offline,
    PublishError,
    RemoteChanged,
    SaezooError,
)
from saezoo.transfer import BUSY, LONGEST_WAIT, ask_again, refuse_bad_token, seconds_to_wait

NONSENSE = (json.JSONDecodeError, KeyError, TypeError, AttributeError)
"""What it raises for an answer that is not as it must be, such as one of a proxy."""
FAILURES = (HTTPError, OSError, ValueError, RuntimeError, *NONSENSE)
"""What a call of huggingface_hub may raise."""

STALLED = 300.0
"""Seconds without a single byte after which a connection counts as broken."""

T = TypeVar("T")


class _Cut(OSError):
    """A connection that broke: worth another try."""


class _TooLong(OSError):
    """A server that wants a longer pause than anyone would sit through."""

    def __init__(self, status: int, seconds: float) -> None:
        super().__init__(f"{status}, {seconds:.0f} s")
        self.status, self.seconds = status, seconds


def find_token(token: str | None) -> str:
    """The token given, else the one that huggingface_hub knows. Raises NoAccess without one."""
    try:
        found = token or get_token()
    except OIDCError:
        raise NoAccess("HF_OIDC_RESOURCE is set, but no token could be had by it") from None
    if not found:
        raise NoAccess("no token: run `hf auth login`, set HF_TOKEN, or pass token=…")
    refuse_bad_token(found)
    return found


def ask(
    what: Callable[[], T], repo: str, doing: str, token: str | None, *, again: bool = True
) -> T:
    """What `what` returns. Busy answers and broken connections are waited out (again=False: the
    client does so itself); all else becomes one of our errors, which says what was being done.
    """

    def once() -> T:
        try:
            return what()
        except HfHubHTTPError:
            raise
        except HTTPError as error:
            raise _Cut from error

    def wait_for(error: OSError, asked: int) -> float | None:
        return pause(error.__cause__ if isinstance(error, _Cut) else error, asked)

    try:
        return ask_again(once, wait_for) if again else once()
    except FAILURES as error:
        cause = error.__cause__ if isinstance(error, _Cut) else error
        raise translated(cause or error, repo, doing, token) from cause


def pause(error: BaseException | None, asked: int) -> float | None:
    """Seconds to wait before asking again; None where that is of no use."""
    if isinstance(error, HfHubHTTPError):
        return seconds_to_wait(error.response.status_code, error.response.headers, asked)
    return 2.0**asked if isinstance(error, (HTTPError, *NONSENSE)) else None


@contextmanager
def patient_client() -> Iterator[None]:
    """Within it huggingface_hub, which waits for as long as a server says, and for ever for one
    that says nothing, gives up above LONGEST_WAIT and STALLED; and it is quiet: its lines hold
    signed URLs, and its bars are many.
    """
    session, verbosity = get_session(), logging.get_verbosity()
    hooks, timeout = session.event_hooks, session.timeout
    session.timeout = STALLED
    session.event_hooks = hooks | {"response": [*hooks["response"], _refuse_long_wait]}
    if verbosity == logging.WARNING:
        logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # of a card whose metadata could be better, and of bars that the environment demands
            warnings.simplefilter("ignore")
            with disable_progress_bars():
                yield
    finally:
        logging.set_verbosity(verbosity)
        session.event_hooks, session.timeout = hooks, timeout


def _refuse_long_wait(response: Any) -> None:
    if response.status_code not in BUSY:
        return
    seconds = seconds_to_wait(response.status_code, response.headers, 0) or 0.0
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        seconds = max(seconds, float(limit.reset_in_seconds))
    if seconds > LONGEST_WAIT:
        raise _TooLong(response.status_code, seconds)


def translated(error: BaseException, repo: str, doing: str, token: str | None) -> SaezooError:
    """The typed error, in our own words and one line; what it came from loses the token too."""
    _forget(error, token)
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub's, around what happened to one file
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = _said(error, token)
    match error:
        case _TooLong():
            return PublishError(
                f"{repo}: the Hub is busy ({error.status}) and wants to be left alone for "
                f"{error.seconds:.0f} s: run the same again then"
            )
        case OfflineModeIsEnabled():
            return Offline(f"{repo}: {doing} needs the Hub, and HF_HUB_OFFLINE forbids that")
        case HfHubHTTPError() if status == 401:
            return NoAccess(
                f"{repo}: the Hub does not know the token: run `hf auth login`, set HF_TOKEN, or "
                "pass token=…"
            )
        case GatedRepoError() | HfHubHTTPError() if status == 403:
            return NoAccess(
                f"{repo}: the token has no permission for {doing}{said}. It takes one with write "
                f"access to {repo.partition('/')[0]}; in others' repos, --pr opens a pull request"
            )
        case RevisionNotFoundError():
            return MissingFile(f"{repo}: {doing} failed, there is no such branch (any more)")
        case RepositoryNotFoundError():
            return MissingFile(
                f"{repo}: the repo is gone from the Hub, or the token may not see it any more"
            )
        case HfHubHTTPError() if status == 412:
            return changed(repo)
        case HfHubHTTPError() if status in BUSY:
            return PublishError(
                f"{repo}: {doing} failed, the Hub is busy ({status}): run the same again later"
            )
        case HfHubHTTPError():
            return PublishError(f"{repo}: {doing} was refused by the Hub ({status}){said}")
        case HFValidationError():
            return BadName(f"{repo!r} is no name of a Hub repo; it must read org/repo")
        case HTTPError() if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            return Offline(f"{repo}: {doing} failed, the Hub cannot be reached")
        case HTTPError():
            kind = type(error).__name__
            return PublishError(
                f"{repo}: {doing} failed, the connection to the Hub broke ({kind}): run the same "
                "again"
            )
        case _ if isinstance(error, NONSENSE):
            kind = type(error).__name__
            return PublishError(f"{repo}: {doing} failed, the Hub's answer makes no sense ({kind})")
        case PermissionError() if error.errno is None:
            # hf_xet's, which carries the upload on the Hub itself
            return NoAccess(f"{repo}: the token has no permission for {doing}{said}")
        case OSError() if error.strerror:
            file = f"{error.filename}: " if error.filename else ""
            return PublishError(f"{repo}: {doing} failed: {file}{error.strerror}")
        case _:
            return PublishError(f"{repo}: {doing} failed{said or f' ({type(error).__name__})'}")


def _forget(error: BaseException | None, token: str | None) -> None:
    """Take the token out of an error and all that led to it, in case a server has said it back:
    a traceback shows them.
    """
    while error is not None and token:
        said = (arg.replace(token, "…") if isinstance(arg, str) else arg for arg in error.args)
        error.args = tuple(said)
        error = error.__cause__ or error.__context__


def changed(repo: str) -> RemoteChanged:
    """For a repo whose head is not the one that was read."""
    return RemoteChanged(
        f"{repo}: somebody else has changed it since it was read, and nothing of theirs was "
        "overwritten: look at it, then run the same again"
    )


def _said(error: BaseException, token: str | None) -> str:
    """`: what the server said`, short, in one line and without the token; empty if nothing."""
    text = error.server_message if isinstance(error, HfHubHTTPError) else str(error)
    line = " ".join((text or "").split())
    if token:
        line = line.replace(token, "…")
    return f": {line[:300].rstrip('.')}" if line else ""
