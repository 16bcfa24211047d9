"""Files of a Hub repo into the cache, by huggingface_hub: a branch is resolved to a commit once,
and every file is had by commit and checked against the hash that names it.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever this huggingface_hub is built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm, validate_repo_id

from saezoo.errors import BadName, Corrupted, FetchError, MissingFile, NoAccess, Offline
from saezoo.transfer import (
    BUSY,
    Access,
    announce,
    ask_again,
    read_json,
    seconds_to_wait,
    verify_file,
    write_json,
)

TIMEOUT = 30.0
"""Seconds that the Hub may take to list a repo."""
SMALL = (".json", ".yaml", ".yml", ".md", ".txt")
"""Files that nobody needs to be told the size of."""

T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """What a repo holds at one commit."""

    repo: str
    commit: str
    files: tuple[str, ...]
    how: str
    """In words, how the commit was come by."""


def list_repo(repo: str, revision: str | None, access: Access) -> Listing:
    """The files of a repo at a revision (None: branch main): one request, then remembered.

    Raises BadName, MissingFile, NoAccess, Offline or FetchError.
    """
    refuse_bad_repo(repo)
    pinned = is_commit(revision)
    memory = _memory(repo, revision or "main", access.root)
    known = _remembered(memory, repo, revision)
    if known and (pinned or not access.refresh):
        return known
    if access.offline:
        if pinned and (have := _cached_files(repo, str(revision).lower(), access.root)):
            return Listing(repo, str(revision).lower(), have, how_pinned(str(revision)))
        at = f"commit {revision}" if pinned else f"branch {revision or 'main'}"
        raise Offline(f"{repo}: {at} is not in the cache {access.root}, and no network is wanted")
    info = ask_hub(
        lambda: HfApi(token=access.token, library_name="saezoo").model_info(
            repo, revision=revision, timeout=TIMEOUT
        ),
        repo,
        revision,
    )
    if not is_commit(info.sha):
        raise FetchError(f"{repo}: the Hub does not say at which commit {revision or 'main'} is")
    files = sorted(item.rfilename for item in info.siblings or [])
    facts: dict[str, Any] = {
        "revision": revision or "main",
        "commit": info.sha,
        "files": files,
        "asked": date.today().isoformat(),
    }
    write_json(memory, facts)
    # whoever asks for this commit by its hash need not ask the Hub again
    write_json(_memory(repo, str(info.sha), access.root), facts | {"revision": info.sha})
    return _listing(repo, revision, facts)


def get_files(
    listing: Listing, files: dict[str, str | None], access: Access, size: int | None = None
) -> list[Path]:
    """The local paths of `files` ({name: sha256 where stated}) at the commit of `listing`.

    size: bytes of all of them, where known. Raises what `list_repo` does, and Corrupted.
    """
    have = {name: _cached(listing, name, sha256, access) for name, sha256 in files.items()}
    lacking = [name for name, path in have.items() if path is None]
    if lacking and access.offline:
        raise Offline(
            f"{listing.repo} at {listing.commit[:8]}…: {', '.join(lacking)} not in the cache "
            f"{access.root}, and no network is wanted"
        )
    if lacking:
        total = size if size is not None else sum(_size(listing, name, access) for name in lacking)
        announce(f"{listing.repo} ({', '.join(lacking)})", total, access.progress)
    return [path or _download(listing, name, files[name], access) for name, path in have.items()]


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which can never point elsewhere."""
    return re.fullmatch(r"[0-9a-fA-F]{40}", revision or "") is not None


def how_pinned(revision: str) -> str:
    """The words for a commit that was asked for as such."""
    return f"commit {revision[:8].lower()}…, as pinned"


def _memory(repo: str, revision: str, root: Path) -> Path:
    """Where the listing of a revision is remembered."""
    return root / "branches" / _folder(repo) / f"{quote(revision, safe='')}.json"


def _listing(repo: str, revision: str | None, facts: dict[str, Any]) -> Listing:
    commit = facts["commit"]
    if is_commit(revision):
        return Listing(repo, commit, tuple(facts["files"]), how_pinned(str(revision)))
    how = (
        f"branch {revision or 'main'}, resolved to {commit[:8]}… on {facts['asked']}; "
        "--refresh asks again"
    )
    return Listing(repo, commit, tuple(facts["files"]), how)


def _remembered(memory: Path, repo: str, revision: str | None) -> Listing | None:
    facts = read_json(memory)
    # file systems that ignore case would give one branch's memory to another
    if facts.get("revision") != (revision or "main") or not is_commit(str(facts.get("commit"))):
        return None
    if not isinstance(facts.get("files"), list):
        return None
    return _listing(repo, revision, {"asked": "an unknown day"} | facts)


def _cached_files(repo: str, commit: str, root: Path) -> tuple[str, ...]:
    """The files of a commit that are in the cache, where nobody has listed it."""
    snapshot = _snapshot(repo, commit, root)
    return tuple(
        sorted(
            path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()
        )
    )


def _cached(listing: Listing, name: str, sha256: str | None, access: Access) -> Path | None:
    """The path of a file that is in the cache and whole, or None. What is damaged is removed."""
    path = _snapshot(listing.repo, listing.commit, access.root) / name
    if not path.is_file():
        return None
    try:
        _verify(path, listing, name, sha256, access)
    except Corrupted:
        if access.offline:
            raise
        return None
    return path


def _download(listing: Listing, name: str, sha256: str | None, access: Access) -> Path:
    downloaded = ask_hub(
        lambda: hf_hub_download(
            listing.repo,
            name,
            revision=listing.commit,
            cache_dir=access.root / "hub",
            token=access.token,
            library_name="saezoo",
            tqdm_class=_Shown if access.progress else _Silent,
        ),
        listing.repo,
        listing.commit,
        name,
        # huggingface_hub waits out 429 itself
        busy=BUSY - {429},
    )
    path = Path(downloaded)
    _verify(path, listing, name, sha256, access)
    return path


def _verify(path: Path, listing: Listing, name: str, sha256: str | None, access: Access) -> None:
    promised = [sha256] if sha256 else []
    if path.is_symlink():
        # the Hub's ETag, which names the blob: sha256 of an LFS file, git's sha1 of any other
        blob = Path(os.readlink(path)).name
        promised += [blob] if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else []
    checked = access.root / "checked" / "hub" / _folder(listing.repo) / listing.commit
    verify_file(path, checked / f"{name}.json", promised, f"{listing.repo}/{name}")


def _size(listing: Listing, name: str, access: Access) -> int:
    if name.endswith(SMALL):
        return 0
    url = hf_hub_url(listing.repo, name, revision=listing.commit)
    metadata = ask_hub(
        lambda: get_hf_file_metadata(url, token=access.token),
        listing.repo,
        listing.commit,
        name,
    )
    return metadata.size or 0


def ask_hub(
    ask: Callable[[], T],
    repo: str,
    revision: str | None,
    file: str = "",
    busy: frozenset[int] = BUSY,
) -> T:
    """What `ask` returns; busy answers are waited out, every error becomes one of ours."""

    def wait_for(error: OSError, asked: int) -> float | None:
        if not isinstance(error, HfHubHTTPError) or error.response.status_code not in busy:
            return None
        return seconds_to_wait(error.response.status_code, error.response.headers, asked)

    try:
        return ask_again(ask, wait_for)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _translated(error, repo, revision or "main", file) from error


def _translated(error: Exception, repo: str, revision: str, file: str) -> FetchError:
    """The typed error, in our own words and one line."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    where = f"{repo}/{file}" if file else repo
    page = f"https://huggingface.co/{repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case GatedRepoError():
            return NoAccess(
                f"{repo} is gated: accept its licence at {page} and pass token=… (or HF_TOKEN)"
            )
        case RevisionNotFoundError():
            return MissingFile(f"{repo}: no branch, tag or commit {revision!r}; see {page}/commits")
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return Offline(f"{where} at {revision} needs the Hub, and no network is had or wanted")
        case EntryNotFoundError():
            return MissingFile(
                f"{repo} at {revision}: no file {file!r}; see {page}/tree/{revision}"
            )
        case RepositoryNotFoundError():
            return MissingFile(
                f"no repo {repo} on the Hub, or it is private: then pass token=… (or HF_TOKEN)"
            )
        case HfHubHTTPError() if status in (401, 403):
            return NoAccess(
                f"{repo}: the Hub refuses the token, or wants one ({status}); see {page}"
            )
        case HfHubHTTPError():
            return FetchError(f"{where}: the Hub answered {status}; try again later")
        case HTTPError() | FileMetadataError():
            kind = type(error).__name__
            return Offline(f"{where} at {revision} needs the Hub, which cannot be reached ({kind})")
        case ValueError() | RuntimeError():
            return FetchError(f"{where}: the Hub's answer makes no sense ({type(error).__name__})")
        case OSError() if error.errno is None:
            return Corrupted(f"{where}: what arrived is not whole; it was not kept, fetch it again")
        case _:
            raise error


def refuse_bad_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise BadName(f"{repo!r} is no name of a Hub repo; it must read org/repo") from None


def _folder(repo: str) -> str:
    return repo_folder_name(repo_id=repo, repo_type="model")


def _snapshot(repo: str, commit: str, root: Path) -> Path:
    return root / "hub" / _folder(repo) / "snapshots" / commit


class _Shown(tqdm):
    """A progress bar, wherever stderr goes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"disable": False}))


class _Silent(tqdm):
    """No progress bar."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"disable": True}))
