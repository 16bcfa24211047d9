"""The repo as it is before anything is published: its head, what is in it, whether it is there."""

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from saezoo.entry import Entry
from saezoo.errors import BadName, PublishError
from saezoo.files import sha256_of
from saezoo.hf import TIMEOUT, is_commit, refuse_bad_repo
from saezoo.hub import fetch_file
from saezoo.publishing.asking import ask, patient_client
from saezoo.publishing.staged import LARGEST_TEXT
from saezoo.transfer import refuse_bad_token

MAIN = "main"


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file."""

    size: int
    git_oid: str
    """git's sha1 of it, or of its pointer where it is in LFS."""
    sha256: str | None = None
    """Of a file in LFS."""


@dataclass(frozen=True)
class Head:
    """A repo's branch as it was read: what is published is published on top of exactly this."""

    repo: str
    branch: str
    revision: str | None
    """Commit; None: there is none yet."""
    files: dict[str, RemoteFile] = field(default_factory=dict)
    exists: bool = True
    private: bool | None = None
    has_branch: bool = True
    """False: revision and files are those of main, where a new branch starts."""


def read_head(repo: str, *, branch: str | None = None, token: str | None = None) -> Head:
    """The head of a branch (None: main) and its files. A repo that is not there, or that the token
    may not see, has exists=False.

    Raises BadName for what is no org/repo, NoAccess, PublishError or Offline.
    """
    refuse_bad_repo(repo)
    if "/" not in repo:
        raise BadName(f"{repo!r}: a repo to publish to reads org/repo")
    token = token or get_token()
    refuse_bad_token(token)
    wanted = branch or MAIN
    with patient_client():
        info = ask(lambda: _info(repo, wanted, token), repo, "reading the repo", token)
        there = not isinstance(info, _NoBranch)
        if isinstance(info, _NoBranch):
            info = ask(lambda: _info(repo, None, token), repo, "reading the repo", token)
        if info is None or isinstance(info, _NoBranch):
            return Head(repo, wanted, None, exists=info is not None)
        if info.sha and not is_commit(info.sha):
            raise PublishError(f"{repo}: the Hub does not say at which commit {wanted} is")
        files = (
            ask(
                lambda: _files(repo, str(info.sha), token),
                repo,
                "listing its files",
                token,
                again=False,
            )
            if info.sha
            else {}
        )
    return Head(repo, wanted, info.sha, files, True, info.private, there)


def read_text(head: Head, path: str, token: str | None = None) -> str | None:
    """A small text file at that head; None if there is none.

    Raises PublishError for one that is not UTF-8 text of at most LARGEST_TEXT bytes, and what
    fetching raises.
    """
    if path not in head.files:
        return None
    if head.files[path].size > LARGEST_TEXT:
        raise PublishError(
            f"{head.repo}: its {path} has {head.files[path].size:,} bytes; at most "
            f"{LARGEST_TEXT:,} are read and changed"
        )
    entry = Entry(source=f"hf://{head.repo}", path=path, revision=head.revision)
    data = fetch_file(entry, token=token, limit=LARGEST_TEXT).path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise PublishError(
            f"{head.repo}: its {path} is no UTF-8 text, so it is left alone"
        ) from None


def make_repo(repo: str, *, private: bool, token: str) -> None:
    """Create a model repo; one that has come to be there meanwhile is left as it is.

    private: without it the owner's default holds. Raises NoAccess or PublishError.
    """
    api = HfApi(token=token, library_name="saezoo")
    with patient_client():
        ask(
            lambda: api.create_repo(
                repo, repo_type="model", private=True if private else None, exist_ok=True
            ),
            repo,
            "creating the repo",
            token,
        )


def same(local: Path | bytes, remote: RemoteFile) -> bool:
    """Whether a local file, or bytes, are what is there."""
    size = len(local) if isinstance(local, bytes) else local.stat().st_size
    if size != remote.size:
        return False
    if remote.sha256 is None:
        data = local if isinstance(local, bytes) else local.read_bytes()
        return git_hash(data) == remote.git_oid
    found = sha256(local).hexdigest() if isinstance(local, bytes) else sha256_of(local)
    return found == remote.sha256


class _NoBranch:
    """A repo that is there, without the branch asked for."""


def _info(repo: str, branch: str | None, token: str | None) -> Any:
    """The Hub's ModelInfo; None without a repo."""
    api = HfApi(token=token or False, library_name="saezoo")
    try:
        return api.model_info(repo, revision=branch, timeout=TIMEOUT)
    except RevisionNotFoundError:
        return _NoBranch()
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if token and error.response.status_code == 401:
            raise  # it is the token that the Hub does not know
        return None


def _files(repo: str, commit: str, token: str | None) -> dict[str, RemoteFile]:
    api = HfApi(token=token or False, library_name="saezoo")
    return {
        item.path: RemoteFile(item.size, item.blob_id, item.lfs.sha256 if item.lfs else None)
        for item in api.list_repo_tree(repo, recursive=True, revision=commit)
        if isinstance(item, RepoFile)
    }
