"""From any kind of name to an Entry: the one place that decides who is asked."""

import os
from dataclasses import replace

from saezoo.entry import Entry
from saezoo.errors import BadName
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
            return find_registered(parsed)
    from saezoo.zoo import Terms, find_in_zoos

    return find_in_zoos(parsed, Terms(token, cache_dir, local_files_only, refresh))
