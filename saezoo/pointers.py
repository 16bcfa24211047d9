"""One layer of a circuit-tracer set by name, `…/layer_3`: the file beside the set's config.yaml, or
the one in another Hub repo that the config points to.

A config may have a list `transcoders`, with a pointer a layer: `hf://org/repo/file?revision=rev`.
It is a stranger's text: only pointers of this form are followed, to a file, never to a second
config, and none leaves the cache. What is pinned at a commit by the registry or a zoo is followed
to a commit only. Paths of the author's own machine, which circuit-tracer would open, are refused.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile, UnsafeFile
from saezoo.transfer import Access, refuse_unsafe_path

FORMAT, CONFIG, LIST = "circuit_tracer", "config.yaml", "transcoders"

POINTED = ("gemma_scope", "gemma_scope_2", FORMAT)
"""Formats that circuit-tracer reads by a pointer."""

LAYER = re.compile(r"layer_(\d{1,4})")
LAYER_FILE = re.compile(r"layer_\d+\.safetensors")
CROSS_LAYER = re.compile(r"W_enc_\d+\.safetensors")
"""A file of a cross-layer transcoder, whose layers belong together: no set of this kind."""
POINTER = re.compile(
    r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)/(?P<file>[^?#@\\\s]+)(?:\?revision=(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)
MAX_POINTER, MAX_LAYERS = 500, 1000


class Set(NamedTuple):
    """Where a set is, and which layer of it is meant."""

    config: Path
    folder: str
    """As names of the set start, empty at a repo's root."""
    layer: int | None
    beside: bool
    """Whether files of layers lie beside the config."""


def follow_pointer(entry: Entry, access: Access) -> Entry:
    """The entry whose files are meant: another's where a set's config points to it, the layer's own
    file for `…/layer_3`, else `entry` as it is.

    Raises UnsafeFile or FormatError for a pointer that is not followed, MissingFile for a layer
    that the set does not have, and what fetching the config raises.
    """
    named = LAYER.fullmatch(entry.path.rpartition("/")[2] or Path(entry.source).name)
    layer = int(named[1]) if named else None
    if entry.source.startswith("hf://"):
        found = _on_the_hub(entry, layer, access)
    elif "://" in entry.source or entry.source.startswith("bundled:"):
        found = None
    else:
        found = _here(entry, layer)
    if found is None:
        return entry
    from saezoo.formats._tensors import read_yaml

    data = read_yaml(found.config)
    if LIST in data and not (found.beside and found.layer is None):
        return _pointed(entry, found, data)
    if found.layer is None:
        return entry
    file = f"{found.folder}/layer_{found.layer}.safetensors".lstrip("/")
    if entry.source.startswith("hf://"):
        return entry.model_copy(update={"path": file})
    path = found.config.parent / f"layer_{found.layer}.safetensors"
    return entry.model_copy(update={"source": str(path), "path": ""})


def _on_the_hub(entry: Entry, layer: int | None, access: Access) -> Set | None:
    from saezoo.hf import get_files, list_repo

    listing = list_repo(entry.source.removeprefix("hf://").strip("/"), entry.revision, access)
    path = entry.path.strip("/")
    if _is_there(path, listing.files):
        if path in listing.files:
            return None
        layer = None  # a folder that happens to be called so, or the set itself
    folder = path if layer is None else path.rpartition("/")[0]
    config = f"{folder}/{CONFIG}".lstrip("/")
    start = config.removesuffix(CONFIG)
    names = [file.removeprefix(start) for file in listing.files if file.startswith(start)]
    if CONFIG not in names or any(map(CROSS_LAYER.fullmatch, names)):
        return None
    beside = any(map(LAYER_FILE.fullmatch, names))
    if layer is None and beside:
        return None
    return Set(get_files(listing, {config: None}, access)[0], folder, layer, beside)


def _here(entry: Entry, layer: int | None) -> Set | None:
    path = Path(entry.source).expanduser() / entry.path
    if path.exists():
        if not path.is_dir():
            return None
        layer = None
    folder = path if layer is None else path.parent
    config = folder / CONFIG
    if not config.is_file():
        return None
    names = [item.name for item in folder.iterdir()]
    if any(map(CROSS_LAYER.fullmatch, names)):
        return None
    beside = any(map(LAYER_FILE.fullmatch, names))
    if layer is None and beside:
        return None
    return Set(config, str(folder), layer, beside)


def _is_there(path: str, files: Collection[str]) -> bool:
    return not path or any(file == path or file.startswith(f"{path}/") for file in files)


def _pointed(entry: Entry, found: Set, data: dict[str, Any]) -> Entry:
    """The entry of the file that the config points to. What is stated of the set's own files says
    nothing of it; where in the model it belongs still holds.
    """
    config, pointers = found.config, data[LIST]
    if data.get("model_kind", "transcoder_set") != "transcoder_set":
        raise FormatError(
            f"{config}: pointers of the kind {str(data['model_kind'])[:40]!r} are not followed; "
            "those of a transcoder_set are"
        )
    if not isinstance(pointers, list) or not 0 < len(pointers) <= MAX_LAYERS:
        raise FormatError(f"{config}: {LIST} is not a list of 1 to {MAX_LAYERS} pointers")
    if found.layer is None:
        raise FormatError(
            f"{config.parent}: a set of {len(pointers)} transcoders that lie elsewhere: name one, "
            f"as {entry.name}/layer_0"
        )
    if found.layer >= len(pointers):
        raise MissingFile(
            f"{config}: there is no layer {found.layer}; the set has 0 to {len(pointers) - 1}"
        )
    if data.get("activation") == "topk":
        # k is of the set, and the files that Gemma Scope has are jumprelu
        raise FormatError(
            f"{config}: says activation 'topk' of files elsewhere, which is not followed; load the "
            f"file by its own name: {str(pointers[found.layer])[:MAX_POINTER]}"
        )
    source, path, revision = parse_pointer(pointers[found.layer], str(config))
    if entry.release is not None and _is_commit(entry.revision) and not _is_commit(revision):
        raise UnsafeFile(
            f"{entry.name}: is pinned at its commit, but points to {source} at no commit, so it is "
            "not followed: it may change"
        )
    facts = {"source": source, "path": path, "revision": revision}
    return entry.model_copy(update=facts | {"format": None, "sha256": None, "size": None})


def _is_commit(revision: str | None) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def parse_pointer(text: object, where: str) -> tuple[str, str, str | None]:
    """(source, path, revision) of `hf://org/repo/file?revision=rev`. Raises UnsafeFile for anything
    else.
    """
    found = POINTER.fullmatch(text) if isinstance(text, str) and len(text) <= MAX_POINTER else None
    if found is None or "" in found["file"].split("/"):
        raise UnsafeFile(
            f"{where}: {str(text)[:120]!r} is no pointer that is followed; those are "
            "hf://org/repo/file?revision=rev"
        )
    try:
        refuse_unsafe_path(found["file"], where)
        refuse_unsafe_path(found["revision"] or "", where)
    except ValueError as error:
        raise UnsafeFile(str(error)) from None
    return f"hf://{found['repo']}", found["file"], found["revision"]
