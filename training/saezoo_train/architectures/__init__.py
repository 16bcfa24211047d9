"""The architectures that can be trained, as one literal table: the name in a recipe, and the class
behind it.
"""

from typing import Any

from saezoo_train.architectures.base import Architecture, Setting, StepOutput
from saezoo_train.architectures.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    "topk": TopK,
}

__all__ = ["ARCHITECTURES", "Architecture", "Setting", "StepOutput", "TopK"]


def __getattr__(name: str) -> Any:
    if name == "TopKTrainer":
        from saezoo_train.architectures._old import TopKTrainer

        return TopKTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
