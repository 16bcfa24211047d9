"""An SAE at an https host. Its folders cannot be listed, so files are asked for by the names that
formats have, one after the other.
"""

from urllib.parse import unquote, urlsplit

from saezoo.config_multi import MOST
from saezoo.entry import Entry
from saezoo.errors import FetchError, MissingFile, NoAccess, Offline
from saezoo.fetched import (
    Fetched,
    detected,
    no_format,
    refuse_wrong_size,
    root_of,
    with_layer,
)
from saezoo.formats import (
    FAMILIES,
    FORMATS,
    LAYER_NAME,
    among,
    format_of,
    format_tables,
    holds_tensors,
    match_file,
)
from saezoo.needed import is_one_file, needed_files, stated_hash
from saezoo.transfer import Access


def fetch_unlisted(entry: Entry, key: str | None, access: Access, extras: bool) -> Fetched:
    from saezoo.https import fetch_optional, fetch_url, folder_of, join_url, shown

    url = join_url(entry.source, entry.path)
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    layer = None
    if found := match_file(name) if key is None else []:
        key = _tell_apart(found, url, access, stated_hash(entry, name, (name,)))
    elif key is None or key in FAMILIES:
        key, url, layer = _probe_layers(url, key, access)
    name = name if is_one_file(name, key) else ""
    base = folder_of(url) if name else url
    there = [*_first_there(key, base, access), *_layer_files_at(base, key, layer, access)]
    required, optional = needed_files(key, extras, shown(url), name, there=there, layer=layer)
    needed = [
        fetch_url(join_url(base, item), access, sha256=stated_hash(entry, item, required))
        for item in required
    ]
    others = [
        fetch_optional(join_url(base, item), access, sha256=stated_hash(entry, item, required))
        for item in optional
    ]
    refuse_wrong_size(entry, needed, [*needed, *(path for path in others if path)])
    local = with_layer(root_of(needed[0], required[0], bool(name)), layer)
    return Fetched(local, key, None, "https, cached")


def _probe_layers(url: str, key: str | None, access: Access) -> tuple[str, str, int | None]:
    """(format, URL of the folder, layer) of a folder that cannot be listed, or of a layer there."""
    from saezoo.https import folder_of

    found = LAYER_NAME.fullmatch(unquote(urlsplit(url).path.rpartition("/")[2]))
    if found is not None:
        # first, because asking for files below the name makes a folder of that name in the cache
        base, layer = folder_of(url), int(found[1])
        for form in among(key, [name for name, form in FORMATS.items() if form.layered]):
            if _has_layer(base, form, layer, access):
                return form, base, layer
    return _probe(url, access, key), url, None


def _probe(url: str, access: Access, key: str | None = None) -> str:
    """The format of a folder that cannot be listed: the first whose files are all there, of those
    that `key` allows.
    """
    from saezoo.https import fetch_url, join_url, shown

    refused: FetchError | None = None
    tables = format_tables()
    for name in (name for formats in tables for name in among(key, list(formats))):
        form = format_of(name)
        try:
            paths = [fetch_url(join_url(url, item), access) for item in form.files]
            _first_there(name, url, access)
        except MissingFile:
            continue
        except NoAccess as error:
            refused = error
            continue
        except Offline as error:
            if not access.offline:
                raise
            refused = error
            continue
        found = detected(root_of(paths[0], form.files[0], False)) if paths else None
        if found and among(key, [found]):
            return found
    raise refused or no_format(shown(url), [])


def _has_layer(base: str, key: str, layer: int, access: Access) -> bool:
    """Whether the folder at a URL is of a format with this layer, as far as names say."""
    from saezoo.https import fetch_optional, join_url

    if format_of(key).layer_files:
        return bool(_layer_files_at(base, key, layer, access))
    files = (fetch_optional(join_url(base, name), access) for name in format_of(key).files)
    return all(files) and bool(_first_there(key, base, access))


def _layer_files_at(base: str, key: str, layer: int | None, access: Access) -> list[str]:
    """The files of layers below a URL that cannot be listed: of the one layer, or of 0, 1, 2, …
    until there is none.
    """
    from saezoo.https import fetch_optional, join_url

    found = []
    for template in format_of(key).layer_files:
        for number in range(MOST) if layer is None else [layer]:
            name = template.replace("{layer}", str(number))
            if fetch_optional(join_url(base, name), access) is None:
                break
            found.append(name)
    return found


def _first_there(key: str, base: str, access: Access) -> list[str]:
    """Of the files of which a format's folder has one, the one that is below a URL."""
    from saezoo.https import fetch_optional, join_url

    known = (item for item in format_of(key).one_of if "*" not in item)
    found = (item for item in known if fetch_optional(join_url(base, item), access))
    return [first] if (first := next(found, None)) else []


def _tell_apart(keys: list[str], url: str, access: Access, sha256: str | None) -> str:
    """Which of the formats of which an SAE is one file with this name, decided by what is in it."""
    from saezoo.https import fetch_optional, fetch_url, folder_of, join_url, shown

    if len(keys) == 1:
        return keys[0]
    local = fetch_url(url, access, sha256=sha256)
    for key in keys:
        if format_of(key).marker and holds_tensors(local, key):
            for item in format_of(key).optional_of(local.name):
                fetch_optional(join_url(folder_of(url), item), access)
    if (found := detected(local)) in keys:
        return str(found)
    raise no_format(shown(url), [local.name])
