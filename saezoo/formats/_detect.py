"""From files to their format: names first, then the config and the tensors that tell apart formats
whose files are called alike.
"""

import fnmatch
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from saezoo.errors import FormatError, MissingFile
from saezoo.formats._lookup import format_of, format_tables
from saezoo.formats._table import FORMATS, Format

LAYER_NAME = re.compile(r"(?:layer_)?(\d{1,4})")
"""What one layer of what spans several is called, below its folder."""


def detect(path: Path) -> str:
    """The format of a local folder or file (or of FILE/PART, or FOLDER/layer_3), decided by the
    files. Raises FormatError that says what was looked for.
    """
    whole, part = split_part(Path(path))
    whole, layer = split_layer(whole)
    try:
        found = _detect(whole, layer)
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file or folder") from None
    if layer is not None and not format_of(found).layered:
        raise MissingFile(f"{path}: no such file or folder, and the format {found} has no layers")
    if part and not format_of(found).parts:
        raise MissingFile(f"{whole}: is one SAE of the format {found}: there is no {part!r} in it")
    return found


def _detect(path: Path, layer: int | None) -> str:
    path.stat()  # raises where there is nothing
    one_file = path.is_file()
    for formats in format_tables():
        if one_file:
            candidates = _called(path.name, formats)
        else:
            candidates = _having(_with_layer(names_in(path, formats), layer, formats), formats)
        marked = {key: holds_tensors(path, key) for key in candidates if _marked(path, key)}
        # a broken file is for a reader to complain about
        found = [key for key in marked if marked[key]]
        if found := found or [key for key in marked if marked[key] is None]:
            return found[0]
    raise FormatError(
        f"{path}: no known format. Looked for {what_files() if one_file else what_folders()}."
        f"{_files_in(path)} Give format=… (--from) if you know it"
    )


def match_names(names: Collection[str]) -> list[str]:
    """Formats whose required files are all among these file names of a folder, the most specific
    first.
    """
    return next(filter(None, (_having(set(names), formats) for formats in format_tables())), [])


def match_file(name: str) -> list[str]:
    """Formats of which one SAE is one file that ends like this, the longest suffix first, and among
    equal ones those that say most of what is in it.
    """
    return next(filter(None, (_called(name, formats) for formats in format_tables())), [])


def _having(names: set[str], formats: Mapping[str, Format]) -> list[str]:
    found = [
        key
        for key, form in formats.items()
        if form.files and names >= set(form.files) and (not form.one_of or form.one_of_in(names))
    ]

    def rank(key: str) -> tuple[int, int]:
        form = formats[key]
        return -len(form.files) - bool(form.one_of), -len(form.holds)

    return sorted(found, key=rank)


def _called(name: str, formats: Mapping[str, Format]) -> list[str]:
    ends = {key: form.is_called(name).rpartition("*")[2] for key, form in formats.items()}

    def rank(key: str) -> tuple[int, bool, int]:
        form = formats[key]
        return -len(ends[key]), form.marker is None, -len(form.holds)

    return sorted((key for key in ends if ends[key]), key=rank)


def split_part(path: Path) -> tuple[Path, str]:
    """(file, part) of FILE/PART, one of several SAEs in a file; (path, "") of all others."""
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return path, ""


def split_layer(path: Path) -> tuple[Path, int | None]:
    """(folder, number) where `path` is no file or folder, but names one layer of the folder it
    would be in, as `FOLDER/layer_3` or `FOLDER/3`; else (path, None).
    """
    found = LAYER_NAME.fullmatch(path.name)
    if found is None or path.exists() or not path.parent.is_dir():
        return path, None
    return path.parent, int(found[1])


def _with_layer(names: set[str], layer: int | None, formats: Mapping[str, Format]) -> set[str]:
    """Names of a folder as if the files of one layer were those of layer 0, which formats require:
    one layer may be all that was fetched.
    """
    for form in formats.values() if layer is not None else ():
        own = {template.replace("{layer}", str(layer)) for template in form.layer_files}
        if own and own <= names:
            names = names | {template.replace("{layer}", "0") for template in form.layer_files}
    return names


def names_in(folder: Path, formats: Mapping[str, Format] = FORMATS) -> set[str]:
    """The file names of a folder, and below it those that formats ask for, all of one moment, even
    while another process replaces it.
    """
    needed = {name for form in formats.values() for name in (*form.files, *form.one_of)}
    deep = {name for name in needed if "/" in name}
    while True:
        before = folder.stat()
        names = {item.name for item in folder.iterdir()}
        names |= {name for name in deep if (folder / name).is_file()}
        after = folder.stat()
        # the time too: the number of a folder that is gone may be given to the next
        if (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns):
            return names


def _marked(path: Path, key: str) -> bool:
    """Whether the config that tells this format from others is there and says so."""
    marker = format_of(key).marker
    if marker is None:
        return True
    config = path / marker[0]
    if path.is_file():
        config = path.with_name(marker[0].replace("{stem}", path.stem))
        if not config.is_file():
            return False
    try:
        data = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        # a broken config is for the reader to complain about, by name and place
        return True
    return isinstance(data, dict) and marker[1] in data


def holds_tensors(path: Path, key: str) -> bool | None:
    """Whether the weights have the tensors that tell this format from others; None where they
    cannot be read.
    """
    form = format_of(key)
    if not form.holds:
        return True
    if path.is_dir():
        names = names_in(path, {key: form})
        path = next(path / name for name in (*form.one_of_in(names), *form.files) if name in names)
    from saezoo.formats._pickled import tensor_names

    held = tensor_names(path)
    return None if held is None else all(fnmatch.filter(held, wanted) for wanted in form.holds)


def _files_in(path: Path) -> str:
    """A hint at the files of a folder of which each may be an SAE."""
    names = sorted(names_in(path)) if path.is_dir() else []
    single = [name for name in names if match_file(name)]
    if not single:
        return ""
    more = " …" if len(single) > 3 else ""
    return f" It holds {', '.join(single[:3])}{more}: name a file, not the folder."


def what_files() -> str:
    """The formats of which an SAE is one file, in words."""
    return ", ".join(
        f"*{suffix} ({key})" for key, form in FORMATS.items() for suffix in form.suffixes
    )


def what_folders() -> str:
    """The formats of which an SAE is a folder, in words."""
    return ", ".join(
        f"{' + '.join([*form.files, *form.one_of[:1]])} ({key})"
        for key, form in FORMATS.items()
        if form.files
    )
