"""The folder beside a result in which its run keeps what it needs to go on."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saezoo.errors import TrainingError
from saezoo.files import write_file
from saezoo_train.checkpoint import PREFIX, sweep
from saezoo_train.config import Recipe
from saezoo_train.metrics_log import NAME as METRICS
from saezoo_train.reading import differences

RECIPE, DONE, LOCK = "recipe.json", "done.json", ".lock"


class RunFolder:
    """NAME.run beside the result NAME."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(out.name + ".run")
        self.activations = self.path / "activations"

    @contextmanager
    def open(self, recipe: Recipe, fingerprint: dict[str, Any], fresh: bool) -> Iterator[None]:
        """Make the folder this recipe's, for this process alone.

        Raises TrainingError, before anything is changed, when it is another recipe's, when its
        local data changed since, when another process trains into it, or when the result is
        something that no run here made.
        """
        from filelock import FileLock, Timeout

        if self.out.exists() and not (self.path / RECIPE).is_file() and not _is_empty(self.out):
            raise TrainingError(
                f"{self.out}: exists, and no run of saezoo train made it: name another --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / LOCK, timeout=0):
                self._claim(recipe, fingerprint, fresh)
                sweep(self.path)
                yield
        except Timeout:
            raise TrainingError(f"{self.path}: another process is training there") from None

    def done(self) -> dict[str, Any] | None:
        """The metrics of the result, when the run ended and its result is still there."""
        if not (self.path / DONE).is_file() or not self.out.is_dir():
            return None
        return json.loads((self.path / DONE).read_text(encoding="utf-8"))

    def finish(self, metrics: dict[str, Any]) -> None:
        """Note that the result is whole, and remove the checkpoints."""
        with write_file(self.path / DONE) as work:
            work.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        for item in self.path.glob(f"{PREFIX}*"):
            shutil.rmtree(item, ignore_errors=True)

    def _claim(self, recipe: Recipe, fingerprint: dict[str, Any], fresh: bool) -> None:
        path = self.path / RECIPE
        if fresh:
            # stored activations are kept: the store itself knows whether they are this recipe's
            for item in (self.path / METRICS, self.path / DONE):
                item.unlink(missing_ok=True)
            for item in self.path.glob(f"{PREFIX}*"):
                shutil.rmtree(item)
        elif path.is_file() and (self.done() is not None or any(self.path.glob(f"{PREFIX}*"))):
            before = json.loads(path.read_text(encoding="utf-8"))
            self._refuse_other(before, recipe, fingerprint)
        with write_file(path) as work:
            values = {"recipe": recipe.model_dump(mode="json"), "data": fingerprint}
            work.write_text(json.dumps(values, indent=1), encoding="utf-8")

    def _refuse_other(
        self, before: dict[str, Any], recipe: Recipe, fingerprint: dict[str, Any]
    ) -> None:
        changed = differences(before["recipe"], recipe.model_dump(mode="json"))
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise TrainingError(
                f"{self.path}: holds a run of another recipe: {'; '.join(changed[:3])}{more}; "
                "name another --out, or start over with --fresh"
            )
        if before["data"] != fingerprint:
            raise TrainingError(
                f"{recipe.data.dataset}: changed since this run began (it was {before['data']}, "
                f"is now {fingerprint}); start over with --fresh"
            )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
