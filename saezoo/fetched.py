"""Files of one SAE on this machine, and whether they are what was promised."""

from dataclasses import dataclass
from pathlib import Path

from saezoo.entry import Entry
from saezoo.errors import Corrupted, FormatError
from saezoo.formats import detect, what_files, what_folders
from saezoo.transfer import remove_linked


@dataclass(frozen=True)
class Fetched:
    """Files of one SAE on this machine."""

    path: Path
    """The folder, or the file where one SAE is one file. One layer of what spans several is called
    `FOLDER/layer_3`, one of several SAEs in a file `FILE/PART`, neither of which is a file.
    """
    format: str
    """A key of saezoo.formats.FORMATS."""
    commit: str | None
    """Of a Hub repo: the commit that was served."""
    how: str
    """In words: which commit and why, or from where."""
    entry: Entry | None = None
    """Whose files these are: another's than was asked for where a config points to it."""


def root_of(path: Path, name: str, one_file: bool) -> Path:
    """What a reader opens: the file itself, or the folder below which it is called `name`."""
    return path if one_file else path.parents[name.count("/")]


def with_layer(local: Path, layer: int | None) -> Path:
    return local if layer is None else local / f"layer_{layer}"


def refuse_wrong_size(entry: Entry, required: list[Path], all_of_them: list[Path]) -> None:
    """Raise Corrupted, and remove the files, when they have not the size that the entry states."""
    sizes = [sum(path.stat().st_size for path in paths) for paths in (required, all_of_them)]
    if entry.size is None or entry.size in sizes:
        return
    for path in all_of_them:
        remove_linked(path)
    raise Corrupted(
        f"{entry.name}: its files have {sizes[0]:,} bytes, {entry.size:,} were promised; they were "
        "removed, fetch it again"
    )


def detected(local: Path) -> str | None:
    try:
        return detect(local)
    except FormatError:
        return None


def no_format(where: str, names: list[str]) -> FormatError:
    among = f" among {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" if names else ""
    return FormatError(
        f"{where}: no known format{among}. Looked for {what_folders()}, {what_files()}. "
        "Give format=… (--from) if you know it"
    )
