"""The two places that a tree can be published to, the Hub and a folder here, with the same steps:
read what is there, compare, put, prove.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from saezoo.check import Finding
from saezoo.entry import Entry
from saezoo.errors import BadName, Offline, PublishError, SaezooError
from saezoo.fill import load_plain
from saezoo.hf import refuse_bad_repo
from saezoo.publishing.asking import find_token
from saezoo.publishing.local import prove_folder, same_there, text_there, write_tree
from saezoo.publishing.prove import prove
from saezoo.publishing.remote import Head, read_head, read_text, same
from saezoo.publishing.staged import CARD, MANIFEST, Progress, Staged
from saezoo.publishing.tree import Place, Tree
from saezoo.publishing.upload import Uploaded, upload


class Target(Protocol):
    """Where a tree goes."""

    called: str
    """hf://org/repo, or the folder."""
    source: str | None
    """Of the registry; None: there is none for a folder of somebody's."""
    uploaded: Uploaded | None
    note: str

    def read(self, dry_run: bool) -> Place:
        """What is there."""

    def has(self, path: str, content: Path | bytes) -> bool | None:
        """Whether a path there has this content; None: there is no such path."""

    def text(self, path: str) -> str | None:
        """A small text file that is there."""

    def below(self, path: str) -> set[str]:
        """The paths of the files in a folder there, seen from it."""

    def put(self, staged: Staged, message: str, progress: Progress) -> None:
        """Write the tree."""

    def proven(self, staged: Staged, entries: Sequence[Entry], progress: Progress) -> list[Finding]:
        """What is seen when it is read again."""

    def names(self, tree: Tree) -> list[str]:
        """What `load_sae` takes, pinned where that can be."""


@dataclass
class HubTarget:
    """A model repo of the HuggingFace Hub."""

    repo: str
    branch: str | None = None
    pr: bool = False
    private: bool = False
    token: str | None = None
    head: Head | None = None
    uploaded: Uploaded | None = None
    note: str = ""

    @property
    def called(self) -> str:
        return f"hf://{self.repo}"

    @property
    def source(self) -> str | None:
        return self.called

    def read(self, dry_run: bool) -> Place:
        refuse_bad_repo(self.repo)
        if not dry_run:
            # before any work: without one nothing comes of it
            find_token(self.token)
        try:
            self.head = read_head(self.repo, branch=self.branch, token=self.token)
        except Offline as error:
            if not dry_run:
                raise
            self.note = f"shown as for a new repo, since the Hub was not asked: {error}"
            return Place(_release(None, self.repo.rpartition("/")[2]), self.repo)
        texts = [self.text(name) for name in (CARD, MANIFEST)]
        return Place(_release(texts[1], self.repo.rpartition("/")[2]), self.repo, *texts)

    def has(self, path: str, content: Path | bytes) -> bool | None:
        remote = self.head.files.get(path) if self.head else None
        return None if remote is None else same(content, remote)

    def text(self, path: str) -> str | None:
        return read_text(self.head, path, self.token) if self.head else None

    def below(self, path: str) -> set[str]:
        start = f"{path}/" if path else ""
        names = self.head.files if self.head else ()
        return {name.removeprefix(start) for name in names if name.startswith(start)}

    def put(self, staged: Staged, message: str, progress: Progress) -> None:
        assert self.head is not None
        self.uploaded = upload(
            staged,
            self.head,
            pr=self.pr,
            private=self.private,
            message=message,
            token=self.token,
            progress=progress,
        )

    def proven(self, staged: Staged, entries: Sequence[Entry], progress: Progress) -> list[Finding]:
        assert self.uploaded is not None
        revision = self.uploaded.revision
        pinned = [entry.model_copy(update={"revision": revision}) for entry in entries]
        found = prove(self.uploaded, staged, pinned, token=self.token, progress=progress)
        _refuse_wrong(found, f"{self.repo} is published at {revision}, but")
        return found

    def names(self, tree: Tree) -> list[str]:
        at = f"@{self.uploaded.revision}" if self.uploaded else ""
        return [_below(f"hf://{self.repo}{at}", row.get("path")) for row in tree.rows]


@dataclass
class FolderTarget:
    """A folder on this disk."""

    folder: Path
    source: str | None = field(default=None, init=False)
    uploaded: Uploaded | None = field(default=None, init=False)
    note: str = ""

    @property
    def called(self) -> str:
        if self.folder.is_absolute() or ".." in self.folder.parts:
            return str(self.folder.resolve())
        # without the ./ it would be the name of a release
        return f"./{self.folder}"

    def read(self, dry_run: bool) -> Place:  # noqa: ARG002 nothing is asked of anybody
        if self.folder.exists() and not self.folder.is_dir():
            raise PublishError(f"{self.folder} is a file: name a folder to publish to")
        texts = [self.text(name) for name in (CARD, MANIFEST)]
        return Place(_release(texts[1], self.folder.absolute().name), None, *texts)

    def has(self, path: str, content: Path | bytes) -> bool | None:
        return same_there(self.folder, path, content)

    def text(self, path: str) -> str | None:
        return text_there(self.folder, path)

    def below(self, path: str) -> set[str]:
        at = self.folder / path
        return {item.relative_to(at).as_posix() for item in at.rglob("*") if item.is_file()}

    def put(self, staged: Staged, message: str, progress: Progress) -> None:  # noqa: ARG002
        write_tree(staged, self.folder, progress)

    def proven(
        self,
        staged: Staged,
        entries: Sequence[Entry],
        progress: Progress,  # noqa: ARG002 it takes no time
    ) -> list[Finding]:
        found = prove_folder(staged, self.folder, entries)
        _refuse_wrong(found, f"{self.folder} is written, but")
        return found

    def names(self, tree: Tree) -> list[str]:
        return [f"{self.called}#{row['id']}" for row in tree.rows]


def find_target(
    target: str | os.PathLike[str],
    *,
    branch: str | None = None,
    pr: bool = False,
    private: bool = False,
    token: str | None = None,
) -> HubTarget | FolderTarget:
    """Which place is meant: `org/repo` or hf://org/repo, or a folder (`./…`, absolute, a path
    object). Raises BadName for anything else, and for options that a folder has not.
    """
    text = os.fspath(target)
    if isinstance(target, os.PathLike) or text.startswith(("./", "../", "/", "~", ".\\")):
        if branch or pr or private:
            raise BadName(f"{text} is a folder: branch, pr and private are for the Hub")
        return FolderTarget(Path(text).expanduser())
    repo = text.removeprefix("hf://").strip("/")
    if "@" in repo or repo.count("/") != 1:
        raise BadName(
            f"{text!r}: write org/repo for the HuggingFace Hub (--branch and --path say where in "
            f"it), or ./{Path(text).name} for a folder"
        )
    refuse_bad_repo(repo)
    return HubTarget(repo, branch, pr, private, token)


def _release(manifest: str | None, otherwise: str) -> str:
    """The first half of the names: what saezoo.yaml says, else the repo's or folder's name."""
    if manifest is not None:
        try:
            if isinstance(known := load_plain(manifest, MANIFEST).get("release"), str):
                return known
        except SaezooError as error:
            raise PublishError(
                f"the {MANIFEST} that is there is none of a release: {error}"
            ) from None
    return re.sub(r"[^\w.+-]+", "-", otherwise).strip("-.") or "saes"


def _below(base: str, path: str | None) -> str:
    return f"{base}/{path}" if path else base


def _refuse_wrong(findings: Sequence[Finding], start: str) -> None:
    wrong = [f"{one.what}: {one.detail}" for one in findings if one.ok is False]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise PublishError(
            f"{start} what comes back is not what was sent: {'; '.join(wrong[:3])}{more}"
        )
