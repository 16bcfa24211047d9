"""Live zoos: collections whose authors keep a `saezoo.yaml` beside their files, pinned on this
machine by name.

A pin is one JSON file with the manifest's text and where, at which commit and when it was read;
`zoo/release/id` is looked up in it with no request. A manifest is a stranger's:
saezoo.manifest says what it may hold.
"""

import difflib
import json
import os
import re
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from saezoo.entry import Entry
from saezoo.errors import BadName, MissingFile, RegistryError, SaezooError, UnknownSAE
from saezoo.files import cache_root, write_file
from saezoo.hub import fetch_file
from saezoo.manifest import FILE, MAX_BYTES, read_manifest, refuse_private
from saezoo.names import Name
from saezoo.registry import Release, expand, find_in

RELEASE_NAME = re.compile(r"[\w.+-]{1,100}")


@dataclass(frozen=True)
class Pin:
    """One manifest as it was read."""

    release: str
    source: str
    """What it was added from: hf://org/repo[@branch], an https URL, or a folder."""
    home: str
    """The source of entries that name none."""
    commit: str | None
    """Of a Hub repo, when it was read."""
    read: str
    """ISO date."""
    text: str

    @property
    def where(self) -> str:
        """How errors call the manifest."""
        return f"{self.source.rstrip('/')}/{FILE}" if not _names_file(self.source) else self.source

    def parse(self) -> Release:
        """The release of the manifest. Raises RegistryError."""
        return read_manifest(self.text.encode(), self.where, self.home, self.commit)


@dataclass(frozen=True)
class Change:
    """What an update did to a pin."""

    pin: Pin
    added: list[str]
    removed: list[str]
    error: str | None = None
    """Why the old pin was kept."""


@dataclass(frozen=True)
class Terms:
    """On which terms manifests are fetched and pins kept."""

    token: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    refresh: bool = False


def add_zoo(source: str | os.PathLike[str], terms: Terms = Terms()) -> Pin:
    """Read the manifest at `source` and pin it on this machine under its release's name.

    Raises RegistryError for a manifest that is not as it must be, BadName where another zoo has the
    name already, or a FetchError.
    """
    pin = read_zoo(source, replace(terms, refresh=not terms.local_files_only))
    known = {old.release: old for old in list_zoos(terms.cache_dir)}
    if pin.release in known and known[pin.release].source != pin.source:
        raise BadName(
            f"zoo/{pin.release} is pinned from {known[pin.release].source} already: "
            f"`saezoo zoo remove {pin.release}` first"
        )
    _write(pin, terms.cache_dir)
    return pin


def update_zoos(releases: list[str], terms: Terms = Terms()) -> list[Change]:
    """Read pinned manifests again (all where none is named). One that is broken or gone keeps its
    old pin.
    """
    changes = []
    for pin in [_pinned(name, terms.cache_dir) for name in releases] or list_zoos(terms.cache_dir):
        try:
            new = read_zoo(pin.source, replace(terms, refresh=True))
            if new.release != pin.release:
                raise RegistryError(f"{new.where}: now calls itself {new.release!r}")
            before, after = (set(expand(item.parse(), item.where)) for item in (pin, new))
        except SaezooError as error:
            changes.append(Change(pin, [], [], str(error)))
            continue
        _write(new, terms.cache_dir)
        changes.append(Change(new, sorted(after - before), sorted(before - after)))
    return changes


def remove_zoo(release: str, cache_dir: str | os.PathLike[str] | None = None) -> Pin:
    """Forget a pinned zoo; files in the cache stay. Raises UnknownSAE where there is none."""
    pin = _pinned(release, cache_dir)
    _place(release, cache_dir).unlink()
    return pin


def list_zoos(cache_dir: str | os.PathLike[str] | None = None) -> list[Pin]:
    """All pins, by name. A damaged pin file is left out."""
    folder = cache_root(os.fspath(cache_dir) if cache_dir else None) / "zoos"
    pins = []
    for path in sorted(folder.glob("*.json")):
        try:
            pins.append(Pin(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError):
            continue
    return pins


def find_in_zoos(name: Name, terms: Terms = Terms()) -> Entry:
    """The entry of `zoo/release/id`, or of `source#id`, whose manifest is read first.

    Raises UnknownSAE, RegistryError or a FetchError.
    """
    pin = (
        _pinned(name.release, terms.cache_dir)
        if name.kind == "zoo"
        else read_zoo(name.source, terms)
    )
    release = pin.parse()
    called = f"zoo/{pin.release}" if name.kind == "zoo" else f"{name.source}#"
    entry = find_in(release, name.id, called, pin.where)
    if entry.source.startswith("https://"):
        _refuse_private_address(entry.source, entry.name)
    if name.kind == "zoo":
        return entry.model_copy(update={"release": called})
    # not pinned, so it has no name here but its place
    return entry.model_copy(update={"release": None, "id": None})


def read_zoo(source: str | os.PathLike[str], terms: Terms = Terms()) -> Pin:
    """The manifest at `hf://org/repo[@revision]`, at an https URL or in a folder, not pinned.

    Raises RegistryError, BadName or a FetchError.
    """
    text = os.fspath(source)
    data, home, commit = _fetch(text, terms)
    now = datetime.now(UTC).date().isoformat()
    pin = Pin("", text, home, commit, now, data.decode("utf-8", "replace"))
    release = read_manifest(data, pin.where, home, commit)
    if not RELEASE_NAME.fullmatch(release.release):
        raise RegistryError(f"{pin.where}: {release.release[:100]!r} is no name of a release")
    return replace(pin, release=release.release)


def _fetch(source: str, terms: Terms) -> tuple[bytes, str, str | None]:
    """(the manifest's bytes, the home of its entries, the commit it is from)."""
    if source.startswith("hf://"):
        repo, _, revision = source.removeprefix("hf://").strip("/").partition("@")
        found = fetch_file(
            Entry(source=f"hf://{repo}", path=FILE, revision=revision or None),
            token=terms.token,
            cache_dir=terms.cache_dir,
            local_files_only=terms.local_files_only,
            refresh=terms.refresh,
            limit=MAX_BYTES,
        )
        return found.path.read_bytes(), f"hf://{repo}", found.commit
    if source.startswith("https://"):
        url = source if _names_file(source) else f"{source.rstrip('/')}/{FILE}"
        refuse_private(url, url)
        _refuse_private_address(url, url)
        found = fetch_file(
            Entry(source=url),
            cache_dir=terms.cache_dir,
            local_files_only=terms.local_files_only,
            refresh=terms.refresh,
            limit=MAX_BYTES,
        )
        return found.path.read_bytes(), url.rpartition("/")[0], None
    if "://" in source:
        raise BadName(f"{source}: a zoo is hf://org/repo, an https:// URL, or a folder")
    path = Path(source).expanduser().resolve()
    file = path if path.is_file() else path / FILE
    if not file.is_file():
        raise MissingFile(f"{path}: there is no {FILE}")
    if file.stat().st_size > MAX_BYTES:
        raise RegistryError(f"{file}: {file.stat().st_size:,} bytes; at most {MAX_BYTES:,}")
    return file.read_bytes(), str(file.parent), None


def _refuse_private_address(url: str, at: str) -> None:
    """Raise RegistryError where a public name stands for an address of this machine's network."""
    import ipaddress

    host = urlsplit(url).hostname or ""
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(host, None)}
    except OSError:
        return  # the fetch says, in its own words, that the host cannot be reached
    for address in found:
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise RegistryError(f"{at}: {host} stands for {address}, no public address")


def _names_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))


def _pinned(release: str, cache_dir: str | os.PathLike[str] | None) -> Pin:
    pins = {pin.release: pin for pin in list_zoos(cache_dir)}
    if release in pins:
        return pins[release]
    close = difflib.get_close_matches(release, pins, n=3, cutoff=0.4)
    hint = f" Closest: {', '.join(close)}." if close else ""
    raise UnknownSAE(
        f"no zoo {release!r} is pinned on this machine.{hint} Add one: saezoo zoo add hf://org/repo"
    )


def _place(release: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    return cache_root(os.fspath(cache_dir) if cache_dir else None) / "zoos" / f"{release}.json"


def _write(pin: Pin, cache_dir: str | os.PathLike[str] | None) -> None:
    with write_file(_place(pin.release, cache_dir)) as part:
        part.write_text(json.dumps(asdict(pin), indent=1), encoding="utf-8")
