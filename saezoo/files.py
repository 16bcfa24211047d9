"""Where files are and go, and how they get there whole: the cache, the registry, atomic files and
folders, hashes.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else $SAEZOO_CACHE, else the platform's cache folder. Not created here."""
    chosen = cache_dir or os.environ.get("SAEZOO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("saezoo", appauthor=False)


@lru_cache(maxsize=1)
def registry_folder() -> Path:
    """registry/ of a checkout, or the installed copy of it."""
    installed = Path(__file__).parent / "_registry"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "registry"


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A work folder beside `folder` that takes its place when the block ends well, and goes away
    when it does not.

    An existing `folder` is replaced by a rename, so that a reader sees the old or the new one,
    never a half.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield work
        work.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, old / "was")
            os.replace(work, folder)
            shutil.rmtree(old)
        else:
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp's own mode hides the file from others who share a cache
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
