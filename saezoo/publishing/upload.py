"""Put a staged tree into a repo: in one commit on top of the head that was read, or in steps, of
which the last gives it a name.

huggingface_hub's upload_folder makes steps too, but in an order of its own, and looks at the head
before the first of them alone.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status

from saezoo.errors import MissingFile, PublishError, SaezooError
from saezoo.hf import is_commit
from saezoo.publishing.asking import (
    FAILURES,
    ask,
    changed,
    find_token,
    patient_client,
    pause,
    translated,
)
from saezoo.publishing.remote import Head, make_repo, read_head, same
from saezoo.publishing.staged import CARD, Progress, Staged
from saezoo.transfer import LONGEST_WAIT, TRIES


@dataclass(frozen=True)
class Limit:
    """The most that goes into one commit. The Hub takes more, but slowly, and times out."""

    files: int = 200
    bytes: int = 50 * 10**9


TOGETHER = Limit(files=64, bytes=10**9)
"""Files that are sent before progress is told again."""


@dataclass(frozen=True)
class Uploaded:
    """Where a tree is now."""

    repo: str
    revision: str
    """The commit that has all of it."""
    url: str
    pull_request: str | None = None
    """The URL of the pull request that was opened."""
    changed: bool = True
    """False: all of it had been there."""


def upload(
    staged: Staged,
    head: Head,
    *,
    pr: bool = False,
    private: bool = False,
    message: str,
    token: str | None = None,
    progress: Progress | None = None,
    one_commit_limit: Limit = Limit(),
) -> Uploaded:
    """Commit what the head lacks of a staged tree; nothing else in the repo is touched.

    What fits into `one_commit_limit` is one commit. Of more, files that are new go first, in steps,
    the weights before the specs; those that replace others go with README.md and saezoo.yaml in the
    last commit, so that no name ever stands for half of something. Files that are there already are
    not sent, so that running it again after an interruption finishes it.

    head: as read_head gave it. A repo that is not there is made, private if that is wanted, once
    the Hub has found nothing wrong with the card. pr: open a pull request.

    Raises NoAccess, MissingFile (repo or branch gone), RemoteChanged (the head is another one by
    now) or PublishError. Each, and a KeyboardInterrupt, says what is in the repo by then.
    """
    token = find_token(token)
    if private and head.private is False:
        raise PublishError(
            f"{head.repo} is there and public: make it private in its settings on the Hub, or "
            "leave out --private. Nothing was published"
        )
    job = _Upload(staged, head, pr, message, token, progress or (lambda *_: None))
    try:
        with patient_client():
            return job.run(private, one_commit_limit)
    except (SaezooError, OSError) as error:
        ours = error
        if not isinstance(ours, SaezooError):
            ours = translated(error, head.repo, "reading the files to publish", None)
        raise type(ours)(f"{ours}. {job.state()}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(job.state()) from None


class _Upload:
    """One upload, which knows how far it has come."""

    def __init__(
        self, staged: Staged, head: Head, pr: bool, message: str, token: str, progress: Progress
    ) -> None:
        self.staged, self.head, self.pr = staged, head, pr
        self.message, self.token, self.progress = message, token, progress
        self.repo, self.ref = head.repo, head.branch
        self.parent = head.revision or ""
        self.api = HfApi(token=token, library_name="saezoo")
        self.made_repo = self.made_branch = False
        self.pull_request: str | None = None
        self.unsure = False
        self.committed = self.sent = self.total = 0
        self.paths: list[str] = []

    def run(self, private: bool, limit: Limit) -> Uploaded:
        if CARD in self.staged.name_files and not self._is_there(CARD):
            self._check_card()
        if not self.head.exists:
            make_repo(self.repo, private=private, token=self.token)
            self.made_repo = True
        self._open()
        new, replacing, names = self._lacking()
        self.paths = [*new, *replacing, *names]
        self.total = sum(map(self.staged.size_of, self.paths))
        for step in self._steps(new, replacing, names, limit):
            self._send(step)
        url = f"{constants.ENDPOINT}/{self.repo}/tree/{self.parent}"
        return Uploaded(self.repo, self.parent, url, self.pull_request, bool(self.paths))

    def state(self) -> str:
        """What is in the repo by now, and how to go on."""
        if self.unsure and self._opens_pr:
            return (
                "A pull request may have been opened all the same: look at "
                f"{constants.ENDPOINT}/{self.repo}/discussions before running this again"
            )
        unsure = "whether the last commit was made is not known: running the same again finds out"
        if self.unsure and not self.committed:
            return unsure[0].upper() + unsure[1:]
        if not self.committed and not self.head.exists and not self.made_repo:
            return "Nothing was published, and no repo was made"
        if not self.committed:
            how = "there, without any of the files" if self.made_repo else "as it was"
            branch = f", but for a new branch {self.ref}" if self.made_branch else ""
            return f"Nothing was published: {self.repo} is {how}{branch}"
        where = f"{self.ref} at {self.parent[:8]}…"
        if self.committed == len(self.paths):
            return f"All files are in {self.repo}, {where}"
        there = f"{self.committed} of {len(self.paths)} files are in {self.repo}, {where}"
        if self.unsure:
            return f"{there}, and {unsure}"
        again = "run the same again"
        if self.pull_request:
            again = f"go on with --branch {self.ref}, and without --pr"
        return f"{there}, but not those that give them a name: {again} to finish it"

    def _open(self) -> None:
        """See to it that there is a branch to commit to, and that its head is known."""
        if self.head.revision is None:
            # a new repo starts with a commit of the Hub's own
            self.head = read_head(self.repo, branch=self.ref, token=self.token)
            if not self.head.exists:
                raise MissingFile(f"{self.repo}: there is no such repo on the Hub (any more)")
            if self.head.revision is None:
                raise PublishError(f"{self.repo}: has no commit yet; make one on the Hub first")
            if any(self._is_there(path) is False for path in self.staged.paths):
                raise changed(self.repo)
        self.parent = str(self.head.revision)
        if not self.head.has_branch and not self.pr:
            start = self.head.revision
            ask(
                lambda: self.api.create_branch(
                    self.repo, branch=self.ref, revision=start, exist_ok=True
                ),
                self.repo,
                f"making the branch {self.ref}",
                self.token,
            )
            self.made_branch = True

    def _is_there(self, path: str, head: Head | None = None) -> bool | None:
        """Whether a path has our bytes at the head; None: there is no such path."""
        remote = (head or self.head).files.get(path)
        if remote is None:
            return None
        return same(self._local(path), remote)

    def _local(self, path: str) -> Path | bytes:
        return (
            self.staged.files[path] if path in self.staged.files else self.staged.name_files[path]
        )

    def _lacking(self) -> tuple[list[str], list[str], list[str]]:
        """(paths that are new, those that replace others, README.md and saezoo.yaml), each without
        what is there.
        """
        there = {path: self._is_there(path) for path in self.staged.paths}
        # weights first: a folder without its spec is nothing yet
        files = sorted(self.staged.files, key=lambda path: (-self.staged.size_of(path), path))
        return (
            [path for path in files if there[path] is None],
            [path for path in files if there[path] is False],
            [path for path in self.staged.name_files if not there[path]],
        )

    def _steps(
        self, new: list[str], replacing: list[str], names: list[str], limit: Limit
    ) -> Iterator[list[str]]:
        whole = list(_parts(self.paths, self.staged.size_of, limit))
        last = [*replacing, *names]
        if len(whole) > 1:
            yield from _parts(new, self.staged.size_of, limit)
            whole = [last]
        yield from filter(None, whole)

    def _check_card(self) -> None:
        """Let the Hub look at the card before anything is sent. Raises PublishError for a field
        that it refuses.
        """
        body = {"content": self.staged.name_files[CARD].decode(), "repoType": "model"}
        headers = {"authorization": f"Bearer {self.token}"}

        def validate() -> None:
            url = f"{constants.ENDPOINT}/api/validate-yaml"
            hf_raise_for_status(get_session().post(url, json=body, headers=headers))

        ask(validate, self.repo, f"checking the card {CARD}", self.token)

    def _send(self, step: list[str]) -> None:
        additions = []
        for part in _parts(step, self.staged.size_of, TOGETHER):
            self.progress("uploading", self.sent, self.total)
            additions += ask(
                partial(self._send_large, part), self.repo, "uploading", self.token, again=False
            )
            self.sent += sum(map(self.staged.size_of, part))
        self.progress("committing", self.sent, self.total)
        self._commit(additions, step)
        self.committed += len(step)

    def _send_large(self, paths: list[str]) -> list[CommitOperationAdd]:
        """Send what the Hub keeps in its storage; the rest goes in the commit itself."""
        additions = [CommitOperationAdd(path, self._local(path)) for path in paths]
        self.api.preupload_lfs_files(
            self.repo,
            additions,
            revision=self.ref,
            create_pr=self._opens_pr,
            free_memory=False,
            # a .gitignore in the repo would leave files out without a word
            gitignore_content="",
        )
        return additions

    @property
    def _opens_pr(self) -> bool:
        return self.pr and self.pull_request is None

    def _commit(self, additions: list[CommitOperationAdd], step: list[str]) -> None:
        """One commit on top of `parent`. An answer that was lost is no reason to commit twice: the
        head tells whether it was made. Of a pull request nothing tells.
        """
        for asked in range(TRIES):
            self.unsure = True
            try:
                made: CommitInfo = self.api.create_commit(
                    self.repo,
                    additions,
                    commit_message=self.message,
                    revision=self.ref,
                    create_pr=self._opens_pr,
                    parent_commit=self.parent,
                )
            except FAILURES as error:
                failed = translated(error, self.repo, "committing", self.token)
                seconds = pause(error, asked)
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                # the Hub was seen to answer 500 for what it had done
                self.unsure = seconds is not None and status not in (429, 503)
                hopeless = seconds is None or seconds > LONGEST_WAIT
                if hopeless or (self.unsure and self._opens_pr):
                    raise failed from error
            else:
                if not is_commit(made.oid):
                    raise PublishError(f"{self.repo}: the Hub does not say which commit it made")
                self.parent, self.unsure = made.oid, False
                if self._opens_pr and made.pr_url:
                    self.pull_request, self.ref = made.pr_url, str(made.pr_revision)
                return
            time.sleep(seconds or 0.0)
            if not self._opens_pr and self._landed(step):
                return
        raise failed

    def _landed(self, step: list[str]) -> bool:
        """Whether a commit of which no answer came was made; RemoteChanged if another was."""
        head = read_head(self.repo, branch=self.ref, token=self.token)
        if not head.exists or head.revision is None:
            raise MissingFile(f"{self.repo}: the repo is gone from the Hub")
        self.unsure = False
        if head.revision == self.parent:
            return False
        if not all(self._is_there(path, head) for path in step):
            raise changed(self.repo)
        self.parent = head.revision
        return True


def _parts(
    paths: Iterable[str], size_of: Callable[[str], int], limit: Limit
) -> Iterator[list[str]]:
    """The paths in order, in parts that fit a limit; what is too large by itself is a part."""
    part: list[str] = []
    size = 0
    for path in paths:
        if part and (len(part) == limit.files or size + size_of(path) > limit.bytes):
            yield part
            part, size = [], 0
        part.append(path)
        size += size_of(path)
    if part:
        yield part
