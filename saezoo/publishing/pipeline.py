"""The walk, written once: folders -> checks -> a staged tree -> one commit (or a folder on this
disk) -> fetched again and compared -> the names that it loads by.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from saezoo import __version__
from saezoo.check import Finding
from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import CannotConvert, NotPublishable, PublishError, SaezooError
from saezoo.files import cache_root
from saezoo.fill import load_plain
from saezoo.formats import FAMILIES, format_of, is_read, native, writable_formats
from saezoo.hub import fetch
from saezoo.names import parse_name
from saezoo.publishing.card import Shown
from saezoo.publishing.checks import find_leaks, find_problems, left_out
from saezoo.publishing.merge import has_our_text
from saezoo.publishing.sources import Source, find_sources
from saezoo.publishing.staged import CARD, MANIFEST, Progress, Staged
from saezoo.publishing.targets import FolderTarget, HubTarget, find_target
from saezoo.publishing.tree import Place, Tree, ids_by_path, rows_there, show, stage
from saezoo.registry import find_registered, release_names
from saezoo.stanza import write_release

State = Literal["new", "changed", "same"]


@dataclass(frozen=True)
class PublishedFile:
    """One file of the tree."""

    path: str
    size: int
    state: State
    """Against what was there before."""


@dataclass(frozen=True)
class Published:
    """What was published, or with dry_run would be."""

    target: str
    """hf://org/repo, or the folder."""
    names: list[str]
    """What `load_sae` takes, at the commit where there is one; one for each SAE."""
    files: list[PublishedFile]
    card: str
    """README.md as it is now."""
    manifest: str
    """saezoo.yaml as it is now."""
    stanza: str
    """The same SAEs for the registry: `saezoo registry add` takes it."""
    dry_run: bool = False
    revision: str | None = None
    """Of a Hub repo, the commit."""
    url: str | None = None
    pull_request: str | None = None
    findings: list[Finding] = field(default_factory=list)
    """What was looked at afterwards, all of it as it must be."""
    left_out: list[str] = field(default_factory=list)
    """Files of the folder that nobody needs."""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain values, without what is not known."""
        plain = {key: value for key, value in vars(self).items() if value not in (None, "")}
        return plain | {
            "files": [vars(file) for file in self.files],
            "findings": [vars(finding) for finding in self.findings],
        }


def publish_sae(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    path: str | None = None,
    private: bool = False,
    licence: str | None = None,
    branch: str | None = None,
    pr: bool = False,
    dry_run: bool = False,
    exports: Sequence[str] = (),
    without_metrics: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Published:
    """Publish a native folder, or all that lie below one, so that anyone can load them by name.

    target: `org/repo` on the HuggingFace Hub, or a folder (`./…`, an absolute one, a path object),
    which gets the same tree. path: where in it; of many SAEs, what comes before each one's own
    folder. licence: instead of what the folders say. branch, pr, private: of the Hub: commit to
    that branch, open a pull request, make a new repo private. exports: formats to put beside each
    SAE, such as saelens. without_metrics: publish although the numbers are lacking. dry_run:
    nothing is written or sent. token: None takes the one that huggingface_hub knows. progress: told
    what is being done, and how many bytes of how many are.

    What is there already is kept: only paths of these SAEs are written, README.md only between our
    marks, and of saezoo.yaml only their rows. Running it again finishes what was interrupted.

    Raises NotPublishable with a line for each reason, CannotConvert for an export that cannot
    express an SAE, BadName, NoAccess, PublishError and the like; each says whether anything was
    published.
    """
    from huggingface_hub import get_token

    _refuse_exports(exports)
    at = find_target(target, branch=branch, pr=pr, private=private, token=token)
    sources = find_sources(_folder_of(folder), path, licence)
    if problems := find_problems(sources, without_metrics=without_metrics):
        raise NotPublishable(problems)
    there = at.read(dry_run)
    place = _with_own_readme(there, sources)
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=root) as work:
        tree = stage(sources, place, exports, Path(work), _others(at, there, sources))
        if problems := find_leaks(tree.staged, _texts(there), token or get_token()):
            raise NotPublishable(problems)
        states = {name: _state(at, tree.staged, name) for name in tree.staged.paths}
        _refuse_strangers(sources, states, place)
        findings: list[Finding] = []
        if not dry_run:
            told = progress or _silent
            at.put(tree.staged, _message(tree), told)
            findings = at.proven(tree.staged, _entries(at, tree, place), told)
        return _published(at, place, tree, states, findings, dry_run, left_out(sources, exports))


def _published(
    at: HubTarget | FolderTarget,
    place: Place,
    tree: Tree,
    states: Mapping[str, State],
    findings: list[Finding],
    dry_run: bool,
    unneeded: list[str],
) -> Published:
    sent = at.uploaded
    manifest = tree.staged.name_files[MANIFEST].decode()
    return Published(
        target=at.called,
        names=at.names(tree),
        files=[PublishedFile(n, tree.staged.size_of(n), state) for n, state in states.items()],
        card=tree.staged.name_files[CARD].decode(),
        manifest=manifest,
        stanza=_stanza(at, place, tree, manifest),
        dry_run=dry_run,
        revision=sent.revision if sent else None,
        url=sent.url if sent else None,
        pull_request=sent.pull_request if sent else None,
        findings=findings,
        left_out=unneeded,
        note=at.note,
    )


def _others(at: HubTarget | FolderTarget, there: Place, sources: Sequence[Source]) -> list[Shown]:
    """The SAEs that were published there before, so that the card is about all of them."""
    ours = {source.path for source in sources}
    found = []
    for row in rows_there(there.manifest):
        path = str(row.get("path", ""))
        start = f"{path}/" if path else ""
        text = None if path in ours else at.text(f"{start}{native.CONFIG}")
        if text is None:
            continue
        try:
            cfg = native.parse_config(text, f"{start}{native.CONFIG}")
            entry = Entry(source="", id=str(row["id"]), path=path, sha256=row.get("sha256"))
        except (SaezooError, ValueError):
            continue  # of another format: its row stays, and our card has nothing to say of it
        if isinstance(cfg, SAEConfig):
            files = at.below(path)
            formats = {name.partition("/")[0] for name in files if "/" in name}
            exports = [name for name in writable_formats() if name in formats]
            found.append(show(cfg, entry, there, files, exports))
    return found


def _stanza(at: HubTarget | FolderTarget, place: Place, tree: Tree, manifest: str) -> str:
    """The rows of these SAEs with their repo and commit; of a folder there is no source that others
    could reach.
    """
    home: dict[str, Any] = {}
    if at.source is not None:
        home["source"] = at.source
        home |= {"revision": at.uploaded.revision} if at.uploaded else {}
    about = load_plain(manifest, MANIFEST).get("about", "")
    return write_release(place.release, about, [row | home for row in tree.rows])


def _entries(at: HubTarget | FolderTarget, tree: Tree, place: Place) -> list[Entry]:
    here = {"release": place.release, "source": at.source or at.called}
    return [Entry.model_validate(row | here) for row in tree.rows]


def _message(tree: Tree) -> str:
    ids = [row["id"] for row in tree.rows]
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return f"Publish {', '.join(ids[:3])}{more} with saezoo {__version__}"


def _texts(place: Place) -> dict[str, str | None]:
    return {CARD: place.readme, MANIFEST: place.manifest}


def _state(at: HubTarget | FolderTarget, staged: Staged, name: str) -> State:
    has = at.has(name, staged.content_of(name))
    return "new" if has is None else "same" if has else "changed"


def _refuse_strangers(sources: Sequence[Source], states: Mapping[str, State], place: Place) -> None:
    """Raise PublishError where another file would be written over: one at our path that is not of
    an SAE that saezoo.yaml has there.
    """
    ours = set(ids_by_path(place.manifest))
    roots = [source.path for source in sources if source.path not in ours]
    others = [
        name
        for name, state in states.items()
        if state == "changed" and name not in (CARD, MANIFEST) and _root_of(name, sources) in roots
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise PublishError(
            f"{', '.join(others[:3])}{more}: something else has that path there, and its "
            f"{MANIFEST} knows no SAE at it. Nothing was published: choose another place with "
            "--path"
        )


def _root_of(name: str, sources: Sequence[Source]) -> str:
    """The path of the SAE that a file is of."""
    paths = [s.path for s in sources if not s.path or name.startswith(f"{s.path}/")]
    return max(paths, key=len)


def _with_own_readme(place: Place, sources: Sequence[Source]) -> Place:
    """Where there is no README.md yet, that of the one folder, with its author's own words."""
    own = sources[0].folder / CARD
    if place.readme is not None or len(sources) > 1 or not own.is_file():
        return place
    text = own.read_text(encoding="utf-8", errors="replace")
    return replace(place, readme=text) if has_our_text(text) else place


def _refuse_exports(exports: Sequence[str]) -> None:
    for name in exports:
        known = name not in (*FAMILIES, "native") and is_read(name)
        if not known or not format_of(name).writable:
            others = ", ".join(other for other in writable_formats() if other != "native")
            raise CannotConvert(f"cannot export to {name!r}; there are {others}")


def _folder_of(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, or that of a bundled SAE by its name."""
    text = os.fspath(folder)
    if isinstance(folder, str) and not Path(text).expanduser().exists() and "://" not in text:
        name = parse_name(text)
        if name.kind == "registry" and name.id and name.release in release_names():
            entry = find_registered(name)
            if entry.source.startswith("bundled:"):
                return fetch(entry).path
            raise NotPublishable(
                [f"{text} is published: `saezoo convert {text} ./folder` makes a folder of it"]
            )
    return Path(text).expanduser()


def _silent(_what: str, _done: int, _total: int) -> None:
    """Tells nobody."""
