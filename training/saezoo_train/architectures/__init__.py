"""The architectures that can be trained, as one literal table: the name in a recipe, and the class
behind it.
"""

from saezoo_train.architectures.base import Architecture, Setting, StepOutput
from saezoo_train.architectures.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    "topk": TopK,
}

__all__ = ["ARCHITECTURES", "Architecture", "Setting", "StepOutput", "TopK"]
