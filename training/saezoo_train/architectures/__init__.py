"""The architectures that can be trained, as one literal table: the name in a recipe, and the class
behind it.
"""

from saezoo_train.architectures.base import Architecture, Setting, StepOutput
from saezoo_train.architectures.batchtopk import BatchTopK
from saezoo_train.architectures.gated import Gated
from saezoo_train.architectures.jumprelu import JumpReLU
from saezoo_train.architectures.matryoshka import Matryoshka
from saezoo_train.architectures.relu import ReLU
from saezoo_train.architectures.topk import TopK

ARCHITECTURES: dict[str, type[Architecture]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "gated": Gated,
    "jumprelu": JumpReLU,
    "relu": ReLU,
}

__all__ = ["ARCHITECTURES", "Architecture", "Setting", "StepOutput"]
