"""Whether the registry still says the truth: every entry's files asked after, none fetched; and the
facts that their hosts state, filled in.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saezoo.entry import Entry
from saezoo.errors import BadName, FetchError, FormatError, MissingFile, Offline, RegistryError
from saezoo.files import registry_folder
from saezoo.fill import fill_file
from saezoo.hf import is_commit
from saezoo.metadata import Hosts, Seen
from saezoo.needed import stated_hash
from saezoo.registry import Release, expand, read_release, release_names
from saezoo.transfer import offline_wanted

Status = Literal["ok", "dead", "changed", "unknown"]
"""dead: a needed file is not there. changed: what is there is not what the registry states.
unknown: the host cannot be reached, or does not say."""


@dataclass(frozen=True)
class Finding:
    """What was seen of one registered SAE."""

    entry: Entry
    status: Status
    detail: str = ""
    """Why it is not ok, in one line; of an SAE that is ok, what could not be looked at."""
    seen: Seen | None = None

    @property
    def size(self) -> int | None:
        """Bytes of all needed files, as the host states them."""
        return _total(self.seen.files.values()) if self.seen else None

    @property
    def sha256(self) -> dict[str, str]:
        """By file name, of the files whose host states it."""
        return _known(self.seen, "sha256")

    def to_json(self) -> dict[str, Any]:
        """As plain values, without what is not known."""
        facts = {
            "name": self.entry.name,
            "status": self.status,
            "detail": self.detail,
            "commit": self.seen.commit if self.seen else None,
            "size": self.size,
            "sha256": self.sha256,
            "md5": _known(self.seen, "md5"),
        }
        return {key: value for key, value in facts.items() if value not in (None, "", {})}


@dataclass(frozen=True)
class Verdict:
    """What was seen of one release, and what was written into it."""

    release: str
    findings: list[Finding]
    is_open: bool = False
    filled: bool = False
    """Whether its YAML was given further facts."""
    not_filled: str = ""
    """Why nothing was written though it was asked for, in words."""

    def count(self, status: Status) -> int:
        """How many SAEs are that."""
        return Counter(finding.status for finding in self.findings)[status]


@dataclass
class _Facts:
    """What a release's YAML lacks and its hosts state."""

    revision: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def verify_releases(
    names: Sequence[str] = (),
    *,
    fill: bool = False,
    token: str | None = None,
    tell: Callable[[Finding], None] | None = None,
) -> Iterator[Verdict]:
    """Ask after the files of every enumerated SAE of these releases (none named: all), release by
    release; nothing is fetched.

    fill: write what is not stated (commit, size, sha256) into each release's YAML as it is done.
    tell: called with each finding.
    Raises UnknownSAE for a name that is no release, RegistryError for a broken file or a registry
    that is not for writing, Offline where no network is wanted.
    """
    if offline_wanted():
        raise Offline("HF_HUB_OFFLINE forbids requests, and verifying is nothing but requests")
    if fill:
        writable_registry()
    releases = [read_release(name) for name in dict.fromkeys(names or release_names())]
    with Hosts(token) as hosts:
        for release in releases:
            findings = []
            for entry in expand(release).values():
                findings.append(verify_entry(entry, hosts))
                if tell is not None:
                    tell(findings[-1])
            filled, reason = _fill(release, findings) if fill else (False, "")
            yield Verdict(release.release, findings, release.is_open, filled, reason)


def verify_entry(entry: Entry, hosts: Hosts) -> Finding:
    """Ask after the files of one SAE, and compare with what the entry states."""
    try:
        seen = hosts.look(entry)
    except (MissingFile, FormatError, BadName) as error:
        return Finding(entry, "dead", str(error))
    except FetchError as error:
        return Finding(entry, "unknown", str(error))
    if wrong := _differences(entry, seen):
        return Finding(entry, "changed", "; ".join(wrong), seen)
    unread = f"its folder is there; which files of the format {entry.format} count is not known"
    return Finding(entry, "ok", "" if seen.files else unread, seen)


def _differences(entry: Entry, seen: Seen) -> list[str]:
    """In words, what the entry states and the host does not."""
    wrong = []
    for name, file in seen.files.items():
        stated = stated_hash(entry, name, seen.required)
        if stated and file.sha256 and stated.lower() != file.sha256:
            wrong.append(f"{name}: sha256 is {file.sha256[:16]}…, {stated[:16]}… is stated")
    if isinstance(entry.sha256, dict):
        gone = [name for name in entry.sha256 if name not in seen.files]
        wrong += [f"{name}: a sha256 is stated, but it is no needed file there" for name in gone]
    # as a fetch sees it: with the optional files or without
    sizes = [
        _total(seen.files[name] for name in seen.required),
        _total(seen.files.values()),
    ]
    if entry.size is not None and None not in sizes and entry.size not in sizes:
        wrong.append(f"{sizes[1]:,} bytes, {entry.size:,} are stated")
    if is_commit(entry.revision) and seen.commit != str(entry.revision).lower():
        wrong.append(f"the Hub answers with commit {seen.commit}, {entry.revision} is stated")
    return wrong


def _fill(release: Release, findings: list[Finding]) -> tuple[bool, str]:
    """Write what the YAML lacks. Returns whether it changed, and why not where there was reason."""
    changed = sum(finding.status == "changed" for finding in findings)
    if changed:
        # a commit pinned now would be one whose files are not those that are stated
        return False, f"{changed:,} changed: settle those first"
    facts = _lacking(release, findings)
    path = registry_folder() / f"{release.release}.yaml"
    try:
        return fill_file(path, facts.revision, facts.files), ""
    except RegistryError as error:
        return False, str(error)


def _lacking(release: Release, findings: list[Finding]) -> _Facts:
    facts = _Facts()
    home = release.shared.get("source")
    of_one_repo = all(finding.entry.source == home for finding in findings)
    for finding in findings:
        entry, seen = finding.entry, finding.seen
        if seen is None or not entry.source.startswith(("hf://", "https://", "http://")):
            continue
        own: dict[str, Any] = {}
        if entry.revision is None and seen.commit is not None:
            if of_one_repo:
                facts.revision = seen.commit
            else:
                own["revision"] = seen.commit
        if entry.size is None and finding.size is not None:
            own["size"] = finding.size
        if entry.sha256 is None and finding.sha256:
            own["sha256"] = finding.sha256
        if own:
            facts.files[str(entry.id)] = own
    return facts


def writable_registry() -> Path:
    """The registry's folder. Raises RegistryError for an installed one, or one not for writing."""
    folder = registry_folder()
    if folder.name == "_registry" or not os.access(folder, os.W_OK):
        raise RegistryError(
            f"the registry {folder} is an installed one or not for writing; do this in a checkout "
            "of your own"
        )
    return folder


def _total(files: Any) -> int | None:
    sizes = [file.size for file in files]
    return sum(sizes) if sizes and None not in sizes else None


def _known(seen: Seen | None, fact: str) -> dict[str, str]:
    files = seen.files if seen else {}
    return {name: getattr(file, fact) for name, file in files.items() if getattr(file, fact)}
