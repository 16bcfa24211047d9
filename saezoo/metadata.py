"""What hosts say of an SAE's files, without fetching them: one request for a Hub repo at a
revision, one HEAD for each file of another host.
"""

import base64
import binascii
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import requests
from huggingface_hub import HfApi, constants

from saezoo.entry import Entry
from saezoo.errors import FetchError, FormatError, MissingFile, NoAccess, Offline
from saezoo.files import sha256_of
from saezoo.formats import (
    FAMILIES,
    FORMATS,
    among,
    format_of,
    is_read,
    match_file,
    match_names,
    split_layer,
)
from saezoo.hf import ask_hub, is_commit, refuse_bad_repo
from saezoo.https import folder_of, join_url, refuse_plain_http, shown
from saezoo.hub import fetch
from saezoo.needed import is_one_file, layer_below, needed_files
from saezoo.transfer import ask_again, refuse_unsafe_path, seconds_to_wait

TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and to wait for an answer; the listing of a large repo takes a while."""

T = TypeVar("T")


@dataclass(frozen=True)
class FileSeen:
    """One file as its host states it; what the host does not say is None."""

    size: int | None = None
    """Bytes."""
    sha256: str | None = None
    md5: str | None = None
    """In hex."""


@dataclass(frozen=True)
class Seen:
    """The needed files of one SAE."""

    files: dict[str, FileSeen]
    """By name below the SAE's folder, those that its format requires first; empty for the folder of
    a format that nothing here reads, since nobody knows which are needed.
    """
    required: tuple[str, ...]
    commit: str | None = None
    """Of a Hub repo."""


@dataclass(frozen=True)
class Repo:
    """A Hub repo at one commit."""

    commit: str
    files: dict[str, FileSeen]


class Hosts:
    """Asks each host as little as possible, and none again that cannot be reached. A context: at
    its end connections are closed.
    """

    def __init__(self, token: str | None = None) -> None:
        self._token = token
        self._repos: dict[tuple[str, str | None], Repo | FetchError] = {}
        self._down: set[str] = set()
        self._session: requests.Session | None = None

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            self._session.close()

    def look(self, entry: Entry) -> Seen:
        """The files that `fetch` would take for this entry.

        Raises what makes a fetch fail: BadName, FormatError, MissingFile, NoAccess, Offline (one
        message for all of a host), or FetchError.
        """
        refuse_unsafe_path(entry.path, entry.name)
        if entry.source.startswith("hf://"):
            return self._look_hub(entry)
        if entry.source.startswith(("https://", "http://")):
            return self._look_https(entry)
        return _look_here(entry)

    def _look_hub(self, entry: Entry) -> Seen:
        name = entry.source.removeprefix("hf://").strip("/")
        repo = self._repo(name, entry.revision)
        folder, one_file = entry.path.strip("/"), ""
        where = f"{name} at {repo.commit[:8]}…: {folder or 'its root'}"
        forms = [entry.format] if entry.format and entry.format not in FAMILIES else []
        if folder in repo.files:
            forms = forms or match_file(folder)
            folder, _, one_file = folder.rpartition("/")
        start = f"{folder}/" if folder else ""
        below = {
            path.removeprefix(start): seen
            for path, seen in repo.files.items()
            if path.startswith(start)
        }
        layer = None
        if not below:
            files, layer = layer_below(folder, repo.files)
            below = {item: repo.files[path] for item, path in files.items()}
        if not below:
            raise MissingFile(f"{where}: no such file or folder")
        forms = forms or among(entry.format, match_names(set(below)))
        if not forms:
            raise FormatError(f"{where}: no known format")
        required, optional = _wanted(forms[0], where, one_file, below, layer)
        if lacking := [item for item in required if item not in below]:
            raise MissingFile(f"{where}: there is no {', '.join(lacking)}")
        names = [*required, *(item for item in optional if item in below)]
        return Seen({item: below[item] for item in names}, required, repo.commit)

    def _repo(self, name: str, revision: str | None) -> Repo:
        known = self._repos.get((name, revision))
        if known is None:
            host = _host(constants.ENDPOINT)
            try:
                known = self._reach(host, lambda: _list_repo(name, revision, self._token))
            except Offline:
                raise
            except FetchError as error:
                known = error
            self._repos[name, revision] = known
        if isinstance(known, FetchError):
            raise known
        return known

    def _look_https(self, entry: Entry) -> Seen:
        url = join_url(entry.source, entry.path)
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        plain = entry.format is not None and entry.format not in FAMILIES
        forms = [str(entry.format)] if plain else match_file(name)
        # a folder that cannot be listed is of the first format whose files are all there
        forms = forms or among(entry.format, [key for key, form in FORMATS.items() if form.files])
        missing: MissingFile | None = None
        for key, there in ((form, there) for form in forms for there in _choices(form)):
            one_file = name if not is_read(key) or is_one_file(name, key) else ""
            base = folder_of(url) if one_file else url
            required, optional = _wanted(key, shown(url), one_file, there)
            try:
                files = {item: self._head(join_url(base, item)) for item in required}
            except MissingFile as error:
                missing = error
                continue
            for item in optional:
                try:
                    files[item] = self._head(join_url(base, item))
                except (MissingFile, NoAccess):
                    continue
            return Seen(files, required)
        raise missing or FormatError(f"{shown(url)}: no known format")

    def _head(self, url: str) -> FileSeen:
        if self._session is None:
            self._session = requests.Session()
        session = self._session
        return self._reach(_host(url), lambda: _ask_head(session, url))

    def _reach(self, host: str, ask: Callable[[], T]) -> T:
        """What `ask` returns. A host that cannot be reached twice in a row is not asked again."""
        if host not in self._down:
            for _ in range(2):
                try:
                    return ask()
                except Offline:
                    continue
            self._down.add(host)
        raise Offline(f"{host} cannot be reached")


def _choices(key: str) -> list[list[str]]:
    """What a folder may have, of the files of which it has one."""
    one_of = format_of(key).one_of if is_read(key) else ()
    return [[name] for name in one_of if "*" not in name] or [[]]


def _wanted(
    key: str,
    where: str,
    one_file: str,
    there: Collection[str] = (),
    layer: int | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that a fetch needs, and those that it takes where they are."""
    if is_read(key):
        return needed_files(key, False, where, one_file, there=there, layer=layer)
    return ((one_file,) if one_file else ()), ()


def _list_repo(repo: str, revision: str | None, token: str | None) -> Repo:
    """All files of a repo at a revision, with sizes and the sha256 of those in LFS: one request."""
    refuse_bad_repo(repo)
    api = HfApi(token=token, library_name="saezoo")
    info = ask_hub(
        lambda: api.model_info(repo, revision=revision, timeout=TIMEOUT[1], files_metadata=True),
        repo,
        revision,
    )
    if not is_commit(info.sha):
        raise FetchError(f"{repo}: the Hub does not say at which commit {revision or 'main'} is")
    files = {
        item.rfilename: FileSeen(item.size, item.lfs.sha256 if item.lfs else None)
        for item in info.siblings or []
    }
    return Repo(str(info.sha), files)


def _ask_head(session: requests.Session, url: str) -> FileSeen:
    """What a host says of the file at `url`. Raises MissingFile, NoAccess, Offline, FetchError."""

    def ask() -> requests.Response:
        # compressed on its way, a file would have another length
        headers = {"Accept-Encoding": "identity"}
        response = session.head(url, allow_redirects=True, timeout=TIMEOUT, headers=headers)
        response.raise_for_status()
        return response

    def wait_for(error: OSError, asked: int) -> float | None:
        if not isinstance(error, requests.HTTPError) or error.response is None:
            return None
        return seconds_to_wait(error.response.status_code, error.response.headers, asked)

    refuse_plain_http(url)
    try:
        response = ask_again(ask, wait_for)
    except requests.HTTPError as error:
        status = error.response.status_code
        if status in (404, 410):
            raise MissingFile(f"{shown(url)}: the host has no such file ({status})") from error
        if status in (401, 403):
            raise NoAccess(f"{shown(url)}: the host gives no access ({status})") from error
        raise FetchError(f"{shown(url)}: the host answered {status} to HEAD") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Offline(f"{shown(url)} cannot be reached ({type(error).__name__})") from error
    except requests.RequestException as error:
        raise FetchError(f"{shown(url)}: the request failed ({type(error).__name__})") from error
    refuse_plain_http(response.url)
    length = response.headers.get("Content-Length", "")
    compressed = response.headers.get("Content-Encoding", "identity") != "identity"
    size = int(length) if length.isdigit() and not compressed else None
    return FileSeen(size, md5=_hex(response.headers.get("Content-MD5")))


def _host(url: str) -> str:
    """Host and port of a URL, without a user's name."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _hex(value: str | None) -> str | None:
    try:
        return base64.b64decode(value or "", validate=True).hex() or None
    except binascii.Error:
        return None


def _look_here(entry: Entry) -> Seen:
    """Files of this package, or of the person's own."""
    fetched = fetch(entry, local_files_only=True)
    one_file = fetched.path.name if fetched.path.is_file() else ""
    folder, layer = split_layer(fetched.path.parent if one_file else fetched.path)
    there = [item.name for item in folder.iterdir()]
    required, optional = _wanted(fetched.format, entry.name, one_file, there, layer)
    names = [*required, *(item for item in optional if (folder / item).is_file())]
    files = {
        item: FileSeen((folder / item).stat().st_size, sha256_of(folder / item)) for item in names
    }
    return Seen(files, required)
