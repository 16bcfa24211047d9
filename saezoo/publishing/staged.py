"""What is about to be published, as values."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CARD, MANIFEST = "README.md", "saezoo.yaml"
"""At the root of a repo or folder: what gives a tree its name. They go last."""
LARGEST_TEXT = 2**20
"""Bytes of a README.md or saezoo.yaml that is changed rather than replaced."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes of how many are there."""


@dataclass(frozen=True)
class Staged:
    """A tree ready to go: files by their path in the repo."""

    files: dict[str, Path]
    """Weights, spec, golden outputs, stats, plots, exports: path in the repo -> local file."""
    name_files: dict[str, bytes]
    """README.md and saezoo.yaml: always in the last commit."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them: nothing else in the repo is touched."""
        return (*self.files, *self.name_files)

    def content_of(self, path: str) -> Path | bytes:
        """One of `paths`: the local file, or the bytes."""
        return self.name_files[path] if path in self.name_files else self.files[path]

    def size_of(self, path: str) -> int:
        """Bytes of one of `paths`."""
        if path in self.name_files:
            return len(self.name_files[path])
        return self.files[path].stat().st_size
