"""The front matter of a card: what the Hub finds and shows a repo by."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from saezoo.config import SAEConfig
from saezoo.publishing.words import HUB_ID

T = TypeVar("T")

_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m
bigscience-bloom-rail-1.0 afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl
gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""
LICENCES = frozenset(_LICENCES.split())
"""What the Hub takes as `license`; anything else is `other` with its name beside it."""
EVALUATED = (("fvu", "FVU"), ("l0", "L0"), ("loss_recovered", "loss recovered"), ("kl", "KL"))


def front_matter(title: str, specs: Sequence[SAEConfig], exports: list[str]) -> dict[str, Any]:
    """The arguments of huggingface_hub's ModelCardData: only what is known."""
    models = unique(cfg.site.model for cfg in specs if cfg.site and cfg.site.model)
    licences = unique(cfg.origin.licence for cfg in specs if cfg.origin and cfg.origin.licence)
    facts: dict[str, Any] = {
        "base_model": _one([model for model in models if HUB_ID.fullmatch(model)]),
        "library_name": "saezoo",
        "pipeline_tag": "feature-extraction",
        "datasets": unique(filter(None, map(_dataset, specs))) or None,
        "tags": ["saezoo", "sparse-autoencoder", "mechanistic-interpretability"]
        + ["transcoder"] * any(cfg.is_transcoder for cfg in specs)
        + unique(cfg.architecture for cfg in specs)
        + exports,
        "metrics": [key for key, _ in EVALUATED if any(key in (c.metrics or {}) for c in specs)]
        or None,
    }
    if len(licences) == 1 and licences[0].lower() in LICENCES:
        facts["license"] = licences[0].lower()
    elif licences:
        # the Hub takes a name of these letters; the card has it as it is
        name = re.sub(r"[^a-z0-9._-]+", "-", " ".join(licences).lower()).strip("-")
        facts |= {"license": "other", "license_name": name}
    if len(specs) == 1:
        facts |= _evaluation(title, specs[0])
    return {key: value for key, value in facts.items() if value is not None}


def _evaluation(title: str, cfg: SAEConfig) -> dict[str, Any]:
    """What the Hub shows beside a model: numbers on a data set that it has."""
    from huggingface_hub import EvalResult

    facts, dataset = cfg.metrics or {}, _dataset(cfg)
    if dataset is None or "version" not in facts:
        return {}
    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=dataset,
            dataset_name=f"{dataset}, held-out documents",
            metric_type=key,
            metric_name=label,
            metric_value=facts[key],
        )
        for key, label in EVALUATED
        if key in facts
    ]
    return {"model_name": title, "eval_results": results} if results else {}


def _dataset(cfg: SAEConfig) -> str | None:
    """The data set of the Hub that it was trained on; none where that was really something else."""
    notes = cfg.notes or {}
    name = notes.get("dataset", "")
    known = "provenance" not in notes and "/" in name and HUB_ID.fullmatch(name)
    return name if known else None


def unique(values: Iterable[T]) -> list[T]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(values))


def _one(values: list[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else values or None
