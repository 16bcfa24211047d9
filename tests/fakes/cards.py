"""What the Hub's /api/validate-yaml says of a README.md, as far as saezoo's cards go: the same
refusals in the same words.
"""

import re
from typing import Any

import yaml

FRONT = re.compile(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---([\r\n]|$)")

LICENCES = (
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "cc", "cc0-1.0", "cc-by-2.0"),
    *("cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "gpl", "gpl-2.0"),
    *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "epl-2.0", "isc", "unlicense", "wtfpl"),
    *("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "odc-by"),
    *("odbl", "pddl", "zlib", "artistic-2.0", "afl-3.0", "ecl-2.0", "ms-pl", "unknown", "other"),
)
"""The ids of https://huggingface.co/docs/hub/repositories-licenses, most of them."""

TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link")
LISTS = ("tags", "datasets", "metrics", "widget")
REPO = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) for the text of a README.md."""
    found = FRONT.match(text)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML in the metadata: {' '.join(str(error).split())}"], []
    if not isinstance(data, dict):
        return ["The metadata must be an object"], []
    return list(_errors(data)), []


def _errors(data: dict[str, Any]) -> Any:
    licences = data.get("license", [])
    for licence in licences if isinstance(licences, list) else [licences]:
        if licence not in LICENCES:
            yield f'"license" must be one of [{", ".join(LICENCES)}]'
    for key in TEXTS:
        if key in data and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    for key in LISTS:
        if key not in data:
            continue
        if not isinstance(data[key], list):
            yield f'"{key}" must be an array'
        elif key != "widget" and not all(isinstance(item, str) for item in data[key]):
            yield f'"{key}[0]" must be a string'
    models = data.get("base_model", [])
    for model in models if isinstance(models, list) else [models]:
        if not isinstance(model, str) or not REPO.fullmatch(model):
            yield (
                f'"base_model" with value "{model}" is not valid. Use a model id from '
                "https://hf.co/models."
            )
    for number, model in enumerate(data.get("model-index") or []):
        if not isinstance(model, dict) or not isinstance(model.get("results"), list):
            yield f'"model-index[{number}].results" is required'
            continue
        for place, result in enumerate(model["results"]):
            for key in ("task", "dataset", "metrics"):
                if key not in result:
                    yield f'"model-index[{number}].results[{place}].{key}" is required'
