"""saezoo: any published sparse autoencoder as one torch module whose numbers equal its authors'
own.

Importing this costs milliseconds: each name below is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saezoo.attaching import attach
    from saezoo.capture import activations
    from saezoo.clt import CrossLayerTranscoder
    from saezoo.clt_layer import CLTLayer
    from saezoo.config import SAEConfig, Site, TokenRule
    from saezoo.config_multi import CLTConfig, CrosscoderConfig
    from saezoo.convert import convert_sae
    from saezoo.crosscoder import Crosscoder
    from saezoo.entry import Entry
    from saezoo.errors import SaezooError
    from saezoo.evaluation import Evaluation, evaluate, evaluate_many
    from saezoo.find import find_sae
    from saezoo.load import load_sae, load_saes
    from saezoo.publishing.pipeline import Published, publish_sae
    from saezoo.sae import SAE
    from saezoo.save import save_sae
    from saezoo.search import list_saes
    from saezoo.selfcheck import self_check
    from saezoo.sparse import SparseFeatures
    from saezoo.stats import feature_stats
    from saezoo.steering import steer

__version__ = "0.1.0"

_HOME = {
    "CLTConfig": "saezoo.config_multi",
    "CLTLayer": "saezoo.clt_layer",
    "CrossLayerTranscoder": "saezoo.clt",
    "Crosscoder": "saezoo.crosscoder",
    "CrosscoderConfig": "saezoo.config_multi",
    "Entry": "saezoo.entry",
    "Evaluation": "saezoo.evaluation",
    "Published": "saezoo.publishing.pipeline",
    "SAE": "saezoo.sae",
    "SAEConfig": "saezoo.config",
    "SaezooError": "saezoo.errors",
    "Site": "saezoo.config",
    "SparseFeatures": "saezoo.sparse",
    "TokenRule": "saezoo.config",
    "activations": "saezoo.capture",
    "attach": "saezoo.attaching",
    "convert_sae": "saezoo.convert",
    "evaluate": "saezoo.evaluation",
    "evaluate_many": "saezoo.evaluation",
    "feature_stats": "saezoo.stats",
    "find_sae": "saezoo.find",
    "list_saes": "saezoo.search",
    "load_sae": "saezoo.load",
    "load_saes": "saezoo.load",
    "publish_sae": "saezoo.publishing.pipeline",
    "save_sae": "saezoo.save",
    "self_check": "saezoo.selfcheck",
    "steer": "saezoo.steering",
}

__all__ = [
    "SAE",
    "CLTConfig",
    "CLTLayer",
    "CrossLayerTranscoder",
    "Crosscoder",
    "CrosscoderConfig",
    "Entry",
    "Evaluation",
    "Published",
    "SAEConfig",
    "SaezooError",
    "Site",
    "SparseFeatures",
    "TokenRule",
    "__version__",
    "activations",
    "attach",
    "convert_sae",
    "evaluate",
    "evaluate_many",
    "feature_stats",
    "find_sae",
    "list_saes",
    "load_sae",
    "load_saes",
    "publish_sae",
    "save_sae",
    "self_check",
    "steer",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'saezoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
