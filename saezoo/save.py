"""Write an SAE as a folder that appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saezoo.build import Model, spec_of, tensors_of
from saezoo.errors import FormatError
from saezoo.files import write_folder
from saezoo.formats import format_of, native
from saezoo.sae import SAE, check_whole


def save_sae(sae: Model, folder: str | os.PathLike[str]) -> Path:
    """Write an SAE, or what spans several layers or models, as a native folder, atomically; an
    existing native folder is replaced. Returns the folder.

    Raises FormatError when `folder` exists and is something else, and PartialSAE for an SAE that
    was loaded in part.
    """
    if isinstance(sae, SAE):
        check_whole(sae, "save_sae")
    with new_folder(Path(folder), "native") as work:
        native.write(spec_of(sae), tensors_of(sae), work)
    return Path(folder)


@contextmanager
def new_folder(folder: Path, format_name: str) -> Iterator[Path]:
    """A work folder that becomes `folder`, which must not exist, be empty, or hold this format and
    nothing else.
    """
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file: name a folder to write to")
    if folder.is_dir():
        form = format_of(format_name)
        names = {item.name for item in folder.iterdir()}
        several = (*form.one_of_in(names), *form.layer_files_in(names))
        known = {*form.files, *form.optional, *several}
        ours = set(form.files) <= names <= known
        if names and not ours:
            raise FormatError(
                f"{folder} exists and is not a {format_name} folder alone: "
                "name another, or empty it"
            )
    with write_folder(folder) as work:
        yield work
