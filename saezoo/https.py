"""One file from an https host into the cache, by pooch: whole, of the promised length and hash, or
not at all.
"""

import base64
import hashlib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import pooch
import requests

from saezoo.errors import BadName, Corrupted, FetchError, MissingFile, NoAccess, Offline
from saezoo.files import sha256_of, write_file
from saezoo.transfer import (
    Access,
    announce,
    ask_again,
    read_json,
    seconds_to_wait,
    verify_file,
    write_json,
    write_marker,
)

TIMEOUT = (10, 60)
"""Seconds to connect, and to wait for the next bytes."""


def fetch_url(url: str, access: Access, *, sha256: str | None = None) -> Path:
    """The local path of a file at `url`, fetched unless it is cached.

    Raises BadName for plain http (but to this machine), MissingFile, NoAccess, Offline, Corrupted
    (length, Content-MD5 or sha256 are not as promised; nothing is kept) or FetchError.
    """
    refuse_plain_http(url)
    path, marker = cache_place(url, access.root)
    promised = [sha256] if sha256 else []
    # without a marker or a hash nothing says that the file is whole
    if path.exists() and not access.refresh and (promised or "sha256" in read_json(marker)):
        try:
            verify_file(path, marker, promised, shown(url))
        except Corrupted:
            if access.offline:
                raise
        else:
            return path
    if access.offline:
        raise Offline(f"{shown(url)} is not in the cache {access.root}, and no network is wanted")
    _download(url, path, marker, sha256, access.progress)
    return path


def fetch_optional(url: str, access: Access, *, sha256: str | None = None) -> Path | None:
    """Like `fetch_url`, but None where the host has no such file; that is remembered too."""
    _, marker = cache_place(url, access.root)
    if read_json(marker).get("absent") and not access.refresh:
        return None
    try:
        return fetch_url(url, access, sha256=sha256)
    except (MissingFile, NoAccess):
        # hosts that do not let their folders be listed answer 403 for what is not there
        write_json(marker, {"absent": True})
        return None
    except Offline:
        if access.offline:
            return None
        raise


def cache_place(url: str, root: Path) -> tuple[Path, Path]:
    """Where the file at `url` lies in the cache, and the marker that says it was checked."""
    parts = urlsplit(url)
    names = [quote(unquote(part), safe=" ") for part in parts.path.split("/") if part]
    if not names or any(name in (".", "..") for name in names):
        raise BadName(f"{shown(url)}: a URL of a file is needed, without '..'")
    if parts.query:
        names.insert(-1, hashlib.sha256(parts.query.encode()).hexdigest()[:16])
    place = Path(quote(parts.netloc, safe=""), *names)
    return root / "https" / place, root / "checked" / "https" / place.with_name(f"{names[-1]}.json")


def join_url(url: str, path: str) -> str:
    """The URL of `path` below the folder `url`."""
    parts = urlsplit(url)
    below = "/".join([parts.path.rstrip("/"), *(quote(part) for part in path.split("/") if part)])
    return urlunsplit((parts.scheme, parts.netloc, below, parts.query, ""))


def folder_of(url: str) -> str:
    """The URL of the folder that the file at `url` is in."""
    parts = urlsplit(url)
    folder = parts.path.rpartition("/")[0]
    return urlunsplit((parts.scheme, parts.netloc, folder, parts.query, ""))


def shown(url: str) -> str:
    """A URL for people: without the query, which may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def refuse_plain_http(url: str) -> None:
    """Raise BadName unless the URL is https, or http to this machine itself."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise BadName(f"{shown(url)}: a URL must not hold a user name or password")
    if parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        return
    raise BadName(f"{shown(url)}: plain http can be changed on its way; use https")


def _download(url: str, path: Path, marker: Path, sha256: str | None, progress: bool) -> None:
    with write_file(path) as part:
        try:
            headers = ask_again(lambda: _get(url, part, progress), _wait_for)
        except requests.RequestException as error:
            raise _translated(error, url) from error
        _check_promises(part, headers, shown(url))
        found = sha256_of(part)
        if sha256 and found != sha256.lower():
            raise Corrupted(
                f"{shown(url)}: sha256 {found[:16]}… arrived, {sha256[:16]}… was promised; "
                "nothing was kept, fetch it again"
            )
    write_marker(marker, path, found)


def _get(url: str, part: Path, progress: bool) -> dict[str, str]:
    """Write the body to `part` and return the headers that came with it, names in lower case."""
    responses: list[requests.Response] = []

    def look(response: requests.Response, **_: object) -> None:
        responses.append(response)
        if response.is_redirect:
            _refuse_redirect(url, urljoin(response.url, response.headers["location"]))
        elif response.ok:
            announce(shown(url), _length(response.headers) or 0, progress)

    download = pooch.HTTPDownloader(
        progressbar=progress,
        chunk_size=2**20,
        timeout=TIMEOUT,
        # compressed on its way, a file would have another length than the one promised
        headers={"Accept-Encoding": "identity"},
        hooks={"response": look},
    )
    try:
        download(url, str(part), None)
    finally:
        # pooch leaves the connection of a refused answer open
        for response in responses:
            response.close()
    return {name.lower(): value for name, value in responses[-1].headers.items()}


def _check_promises(part: Path, headers: dict[str, str], where: str) -> None:
    """Raise Corrupted unless the body has the length and the MD5 that its headers promise."""
    if headers.get("content-encoding", "identity") != "identity":
        raise FetchError(f"{where}: the host sent it compressed, though it was asked not to")
    length, arrived = _length(headers), part.stat().st_size
    if length is not None and length != arrived:
        raise Corrupted(f"{where}: {arrived:,} bytes arrived of {length:,}; fetch it again")
    if "content-md5" in headers:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()
        if base64.b64encode(digest).decode() != headers["content-md5"].strip():
            raise Corrupted(f"{where}: its Content-MD5 is not that of what arrived; fetch it again")


def _length(headers: Mapping[str, str]) -> int | None:
    value = headers.get("content-length", "")
    return int(value) if value.isdigit() else None


def _refuse_redirect(url: str, target: str) -> None:
    try:
        refuse_plain_http(target)
    except BadName:
        raise FetchError(
            f"{shown(url)}: the host sends on to {shown(target)}, which is not https"
        ) from None


def _wait_for(error: OSError, asked: int) -> float | None:
    if not isinstance(error, requests.HTTPError) or error.response is None:
        return None
    return seconds_to_wait(error.response.status_code, error.response.headers, asked)


def _translated(error: requests.RequestException, url: str) -> FetchError:
    """The typed error, in our own words: the library's hold the whole URL."""
    where, status = shown(url), error.response.status_code if error.response is not None else None
    kind = type(error).__name__
    if status in (404, 410):
        return MissingFile(f"{where}: the host has no such file ({status})")
    if status in (401, 403):
        return NoAccess(f"{where}: the host gives no access, or has no such file ({status})")
    if status is not None:
        return FetchError(f"{where}: the host answered {status}; try again later")
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return Corrupted(f"{where}: the connection broke off; nothing was kept, fetch it again")
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        host = urlsplit(url).hostname
        return Offline(f"{where} is not in the cache, and {host} cannot be reached ({kind})")
    return FetchError(f"{where}: the request failed ({kind})")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
