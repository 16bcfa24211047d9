"""Write the registry's YAML of dictionary_learning releases from a table of published SAEs.

    python scripts/make_registry.py FACTS.jsonl.gz [--check]

FACTS has one JSON object a line: release, id, repo, path, format, model, and where known
neuronpedia.
Rows that differ only in layer, trainer and step become one family; --check writes nothing and
compares what the registry expands to with the table, row by row.
"""

import gzip
import itertools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from saezoo.registry import expand, read_release  # noqa: E402 the checkout's own

FORMAT = "dictionary_learning"

MODELS = {"gemma-2-2b": "google/gemma-2-2b", "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped"}
"""Short names in the table -> HuggingFace ids."""

NUMBERS = (
    (re.compile(r"(?<=resid_post_layer_)\d+|(?<=blocks\.)\d+|(?<=/)\d+(?=-)"), "layer"),
    (re.compile(r"(?<=trainer_)\d+"), "trainer"),
    (re.compile(r"(?<=step_)\d+"), "step"),
)


class Readable(yaml.SafeDumper):
    """Lists on one line, and no anchors: what stands in a file is read where it stands."""

    def ignore_aliases(self, _data: Any) -> bool:
        """Write everything out."""
        return True


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    on_one_line = not any(isinstance(item, dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, on_one_line)


Readable.add_representer(list, _represent_list)


def main() -> None:
    """Write or check every release of the table's FORMAT rows."""
    facts = [word for word in sys.argv[1:] if not word.startswith("-")]
    if len(facts) != 1:
        sys.exit(__doc__)
    by_release: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(facts[0], "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["format"] == FORMAT:
                by_release[row["release"]].append(row)
    for release, rows in sorted(by_release.items()):
        if "--check" not in sys.argv:
            text = yaml.dump(
                make_release(release, rows), Dumper=Readable, sort_keys=False, width=200
            )
            (ROOT / "registry" / f"{release}.yaml").write_text(text, encoding="utf-8")
        check(release, rows)
    print(
        f"{sum(map(len, by_release.values())):,} SAEs in {len(by_release)} releases are as stated"
    )


def make_release(release: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One release as the YAML holds it."""
    model = MODELS.get(rows[0]["model"], rows[0]["model"])
    stack = "gpt_neox.layers" if "pythia" in model else "model.layers"
    width = re.search(r"width-2pow(\d+)", release)
    site = {
        "layer": "{layer}",
        "point": "resid_post",
        "module": f"{stack}.{{layer}}",
        "hook_name": "blocks.{layer}.hook_resid_post",
    }
    shared = {
        "format": FORMAT,
        "source": f"hf://{rows[0]['repo']}",
        "author": rows[0]["repo"].partition("/")[0],
        "site": {"model": model},
    }
    if width:
        shared["d_sae"] = 2 ** int(width[1])
    families = [
        {"id": template["id"], "each": each, "facts": {**facts_of(template), "site": site}}
        for template, each in find_families(rows)
    ]
    about = f"{len(rows)} SAEs on the residual stream of {model}, by dictionary_learning."
    return {"release": release, "about": about, "shared": shared, "families": families}


def facts_of(template: dict[str, str]) -> dict[str, str]:
    """What a family says of each of its SAEs."""
    return {key: template[key] for key in ("path", "neuronpedia") if template.get(key)}


def find_families(rows: list[dict[str, Any]]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Templates and the values of their placeholders; every combination of those is a row."""
    groups: dict[tuple[str, ...], list[dict[str, int]]] = defaultdict(list)
    for row in rows:
        numbers: dict[str, int] = {}
        template = tuple(
            abstract(row.get(key) or "", numbers) for key in ("id", "path", "neuronpedia")
        )
        groups[template].append(numbers)
    families = []
    for template, members in groups.items():
        named = dict(zip(("id", "path", "neuronpedia"), template, strict=True))
        for block in as_products(members):
            families.append((named, {key: compact(values) for key, values in block.items()}))
    return families


def abstract(text: str, numbers: dict[str, int]) -> str:
    """Put {layer}, {trainer}, {step} in place of the numbers, which must agree within a row."""
    for pattern, name in NUMBERS:
        for found in set(pattern.findall(text)):
            if numbers.setdefault(name, int(found)) != int(found):
                raise SystemExit(f"{text}: two values of {name}")
        text = pattern.sub(f"{{{name}}}", text)
    return text


def as_products(members: list[dict[str, int]]) -> list[dict[str, list[int]]]:
    """Split rows into full products of values: all at once, else layer by layer, and so on."""
    values = {key: sorted({row[key] for row in members}) for key in members[0]}
    if len(list(itertools.product(*values.values()))) == len(members):
        return [values]
    key = max(values, key=lambda name: (len(values[name]) > 1, name == "layer", name == "trainer"))
    parts = [[row for row in members if row[key] == value] for value in values[key]]
    return [block for part in parts for block in as_products(part)]


def compact(values: list[int]) -> str | list[int]:
    """A range as "0..11"."""
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}"
    return values


def check(release: str, rows: list[dict[str, Any]]) -> None:
    """Exit unless the registry's release holds these rows and no others."""
    entries = expand(read_release(release))
    stated = {row["id"]: row for row in rows}
    if entries.keys() != stated.keys():
        odd = sorted(entries.keys() ^ stated.keys())[:3]
        sys.exit(f"{release}: {len(entries)} ids, {len(stated)} stated, such as {odd}")
    for key, row in stated.items():
        entry = entries[key]
        ours = (entry.source, entry.path, entry.neuronpedia)
        theirs = (f"hf://{row['repo']}", row["path"], row.get("neuronpedia"))
        if ours != theirs:
            sys.exit(f"{release}/{key}: {ours} is not {theirs}")


if __name__ == "__main__":
    main()
