"""Rows of metrics: always as JSON lines in the run's folder; to a service only where the recipe
asks for it.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from saezoo.errors import DataError, MissingExtra
from saezoo.files import write_file
from saezoo_train.watch import Row

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends rows to metrics.jsonl, and sends them to the recipe's logger."""

    def __init__(self, folder: Path, step: int, logger: "Wandb | None" = None) -> None:
        """step: updates made. Rows of later ones, from a run that died, are dropped: they come
        again.
        """
        self.path, self.logger = folder / NAME, logger
        kept = [row for row in read_rows(self.path) if row["step"] <= step]
        with write_file(self.path) as work:
            work.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.rows = len(kept)

    def add(self, row: Row) -> None:
        """One more row, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows += 1
        if self.logger is not None:
            self.logger.add(row)

    def close(self) -> None:
        """Tell the logger that this was all."""
        if self.logger is not None:
            self.logger.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; none where it is not there. A last line that was cut off is left
    out.

    Raises DataError for a file that is something else.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            assert isinstance(row["step"], int)
        except (ValueError, KeyError, TypeError, AssertionError):
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: is no row of metrics") from None
        rows.append(row)
    return rows


class Wandb:
    """Rows go to Weights & Biases. A run that goes on continues its curves there."""

    def __init__(self, name: str, config: dict[str, Any], folder: Path) -> None:
        """Raises MissingExtra where wandb is not installed."""
        if importlib.util.find_spec("wandb") is None:
            raise MissingExtra("run.logger=wandb needs wandb: pip install wandb")
        import wandb

        self._run = wandb.init(
            project="saezoo",
            name=name,
            config=config,
            dir=str(folder),
            id=_id_of(folder),
            resume="allow",
        )

    def add(self, row: Row) -> None:
        """One row, at its step."""
        self._run.log({key: value for key, value in row.items() if key != "step"}, row["step"])

    def close(self) -> None:
        """The run is over."""
        self._run.finish()


def _id_of(folder: Path) -> str:
    """The name that the service knows this run by: made once, kept in the run's folder."""
    path = folder / "wandb-id"
    if not path.is_file():
        import secrets

        with write_file(path) as work:
            work.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
