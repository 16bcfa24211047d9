"""From any kind of name to an Entry: the one place that decides who is asked."""

import os
from dataclasses import replace

from saezoo.entry import Entry
from saezoo.errors import BadName, UnknownSAE
from saezoo.formats import LAYER_NAME, may_have_layers
from saezoo.index import release_called
from saezoo.names import Name, parse_name
from saezoo.registry import find_registered, release_names


def find_sae(
    name: str | os.PathLike[str] | Name,
    id: str | None = None,  # noqa: A002 the name that SAELens' users know
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    refresh: bool = False,
) -> Entry:
    """What is known of an SAE, by any kind of name. Nothing is fetched, but for `source#id`: there
    the source's saezoo.yaml is, and token, cache_dir, local_files_only and refresh are for that.

    Raises BadName, UnknownSAE (listing the closest), AmbiguousName, RegistryError, or a FetchError.
    """
    parsed = name if isinstance(name, Name) else parse_name(name, id, revision=revision)
    match parsed.kind:
        case "hub":
            return Entry(source=f"hf://{parsed.repo}", path=parsed.path, revision=parsed.revision)
        case "https":
            return Entry(source=parsed.url)
        case "local":
            if parsed.revision or revision:
                raise BadName(f"{parsed.path}: only Hub repos have revisions")
            return Entry(source=parsed.path)
        case "registry":
            if parsed.release not in release_names():
                known = release_called(parsed.release)
                parsed = replace(parsed, release=known or parsed.release)
            return _registered(parsed)
    from saezoo.zoo import Terms, find_in_zoos

    return find_in_zoos(parsed, Terms(token, cache_dir, local_files_only, refresh))


def _registered(name: Name) -> Entry:
    """An entry of the registry, or `RELEASE/ID/layer_3` of an entry that spans several layers."""
    try:
        return find_registered(name)
    except UnknownSAE:
        base, slash, last = (name.id or "").rpartition("/")
        if not slash or LAYER_NAME.fullmatch(last) is None:
            raise
        try:
            whole = find_registered(replace(name, id=base))
        except UnknownSAE:
            whole = None
        if whole is None or not may_have_layers(whole.format):
            raise
    # what is stated of all files together says nothing of one layer's
    here = {"id": name.id, "path": f"{whole.path}/{last}".lstrip("/"), "sha256": None, "size": None}
    return whole.model_copy(update=here)
