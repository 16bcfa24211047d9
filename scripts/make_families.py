"""Write the registry's YAML of releases from a table of published SAEs: those of SAELens, Gemma
Scope and the other formats of describe_saes.FORMATS.

    python scripts/make_families.py FACTS.jsonl.gz [FOLDER] [--check]

FACTS has one JSON object a line: release, id, repo, path, format, model, and where known l0,
variance_explained, neuronpedia and norm_scaling_factor.
SAEs whose ids, paths and facts follow one pattern become a family, any other is a row of its own.
--check writes nothing and compares what FOLDER (registry/) expands to with the table, row by row.
"""

import gzip
import json
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from describe_saes import (  # noqa: E402
    CORRECTIONS,
    FORMATS,
    GIVEN,
    HUNG,
    WIDTHS,
    Facts,
    about,
    aliases,
    describe,
    shared_facts,
)

from saezoo.registry import Release, expand  # noqa: E402 the checkout's own


def main() -> None:
    """Write or check every release of the table's FORMATS rows."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if not words or len(words) > 2:
        sys.exit(__doc__)
    folder = Path(words[1]) if len(words) == 2 else ROOT / "registry"
    by_release = read_table(Path(words[0]))
    if "--check" not in sys.argv:
        for release, rows in by_release.items():
            text = write_release(release, rows)
            (folder / f"{release}.yaml").write_text(text, encoding="utf-8")
    seconds = {"read": 0.0, "expand": 0.0}
    for release, rows in by_release.items():
        check(folder / f"{release}.yaml", rows, seconds)
    counts = Counter(row["format"] for rows in by_release.values() for row in rows)
    size = sum((folder / f"{release}.yaml").stat().st_size for release in by_release)
    print(
        f"{counts.total():,} SAEs in {len(by_release)} releases are as stated: {dict(counts)}; "
        f"{size:,} bytes, read in {seconds['read']:.2f} s, expanded in {seconds['expand']:.2f} s"
    )


def read_table(path: Path) -> dict[str, list[Facts]]:
    """The rows of each release, corrected; facts that are not known are left out."""
    by_release: dict[str, list[Facts]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["format"] not in FORMATS:
                continue
            row |= CORRECTIONS.get((row["release"], row["id"]), {})
            stated = re.search(r"average_l0_(\d+)$", row["path"])
            if stated and row.setdefault("l0", int(stated[1])) != int(stated[1]):
                sys.exit(f"{row['release']}/{row['id']}: l0 is {row['l0']}, path {row['path']}")
            for key in GIVEN:
                if isinstance(row.get(key), float) and row[key].is_integer():
                    row[key] = int(row[key])
            by_release[row["release"]].append(
                {key: value for key, value in row.items() if value is not None}
            )
    return dict(sorted(by_release.items()))


def write_release(release: str, rows: list[Facts]) -> str:
    """One release as YAML: the shared facts in blocks, then a line for each row, then families."""
    shared = shared_facts(release, rows)
    saes, families = [], []
    for facts, each in find_families(rows):
        own = leave_out(facts, shared)
        for key in ("d_sae", "k"):
            if key in shared:
                own.pop(key, None)
        alone = {key: value for key, value in each.items() if not isinstance(value, list | dict)}
        own = fill(own, alone)
        each = {key: value for key, value in each.items() if key not in alone}
        if each:
            families.append(write_family(own, each))
        else:
            saes.append(f"- {on_one_line(own)}\n")
    head: Facts = {"release": release, "about": about(rows, shared)}
    if other_names := aliases(release, rows):
        head["aliases"] = other_names
    head["shared"] = shared
    text = yaml.safe_dump(head, sort_keys=False, width=1000, allow_unicode=True)
    for name, items in (("saes", saes), ("families", families)):
        if items:
            text += f"{name}:\n" + "".join(items)
    return text


def write_family(facts: Facts, each: Facts) -> str:
    """A family as YAML; what hangs on each value has a line of its own."""
    lines = [f"- id: {facts.pop('id')}", "  each:"]
    for key, choice in each.items():
        if isinstance(choice, dict) and len(choice) > 4:
            lines.append(f"    {key}:")
            lines += [f"      {value}: {on_one_line(more)}" for value, more in choice.items()]
        elif isinstance(choice, list):
            lines.append(f"    {key}: {on_one_line(compact(choice))}")
        else:
            lines.append(f"    {key}: {on_one_line(choice)}")
    lines.append("  facts:")
    lines += [f"    {on_one_line({key: value})[1:-1]}" for key, value in facts.items()]
    return "\n".join(lines) + "\n"


def find_families(rows: list[Facts]) -> list[tuple[Facts, Facts]]:
    """Patterns and what their placeholders are: one value, a list, or values with what hangs on
    them.
    """
    groups: dict[str, list[Facts]] = defaultdict(list)
    for row in rows:
        facts, values = describe(row)
        groups[json.dumps(facts)].append(values)
    families = []
    for pattern, members in groups.items():
        keys = list(members[0])
        axis = next(key for key in ("d_sae", "layer", "l0") if key in keys)
        inner = [axis, *(key for key in HUNG if key in keys and key != axis)]
        outer = [key for key in keys if key not in inner]
        inside: dict[tuple[Any, ...], set[tuple[Any, ...]]] = defaultdict(set)
        for values in members:
            at = tuple(values[key] for key in outer)
            inside[at].add(tuple(values[key] for key in inner))
        alike: dict[frozenset[tuple[Any, ...]], set[tuple[Any, ...]]] = defaultdict(set)
        for at, within in inside.items():
            alike[frozenset(within)].add(at)
        for some, places in alike.items():
            for block in as_products(places, outer):
                each = hang(inner, sorted(some)) | {
                    key: choice if len(choice) > 1 else choice[0] for key, choice in block.items()
                }
                families.append((json.loads(pattern), widen(each)))
    return families


def hang(keys: list[str], rows: list[tuple[Any, ...]]) -> Facts:
    """The values of the first key, and the others as one value, or by the first key's values."""
    columns = {
        key: list(dict.fromkeys(column))
        for key, column in zip(keys, zip(*rows, strict=True), strict=True)
    }
    each: Facts = {key: values[0] for key, values in columns.items() if len(values) == 1}
    varied = [key for key in keys[1:] if key not in each]
    values = columns[keys[0]]
    if not varied or len(values) == 1:
        return each | {key: columns[key] for key in keys if key not in each}
    by_value: dict[str, list[Any]] = defaultdict(list)
    for value in values:
        mine = [dict(zip(keys, row, strict=True)) for row in rows if row[0] == value]
        more = {key: list(dict.fromkeys(row[key] for row in mine)) for key in varied}
        if sum(len(some) > 1 for some in more.values()) > 1:
            raise SystemExit(f"{keys}: two facts vary at {value}")
        one = {key: some if len(some) > 1 else some[0] for key, some in more.items()}
        by_value[json.dumps(one)].append(value)
    runs: dict[Any, tuple[Any, str]] = {}
    for facts, members in by_value.items():
        for run in split_runs(members):
            runs |= (
                {run[0]: (compact(run), facts)} if len(run) > 2 else {v: (v, facts) for v in run}
            )
    return {keys[0]: {runs[v][0]: json.loads(runs[v][1]) for v in sorted(runs)}} | each


def split_runs(values: list[int]) -> list[list[int]]:
    """Consecutive numbers together."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return runs


def widen(each: Facts) -> Facts:
    """Add the number of features to each width."""
    width = each.get("width")
    if isinstance(width, str):
        return each | {"d_sae": WIDTHS[width]}
    if isinstance(width, list):
        width.sort(key=WIDTHS.__getitem__)
        return each | {"width": {word: {"d_sae": WIDTHS[word]} for word in width}}
    return each


def as_products(rows: set[tuple[Any, ...]], keys: list[str]) -> list[dict[str, list[Any]]]:
    """Split rows of values into few full products: the best first cut, and so on in each part."""
    if not keys:
        return [{}]
    best: list[dict[str, list[Any]]] = []
    for place, key in enumerate(keys):
        rest: dict[Any, set[tuple[Any, ...]]] = defaultdict(set)
        for row in rows:
            rest[row[place]].add(row[:place] + row[place + 1 :])
        alike: dict[frozenset[tuple[Any, ...]], list[Any]] = defaultdict(list)
        for value in sorted(rest):
            alike[frozenset(rest[value])].append(value)
        blocks = [
            {key: values} | block
            for left, values in alike.items()
            for block in as_products(set(left), keys[:place] + keys[place + 1 :])
        ]
        if not best or len(blocks) < len(best):
            best = blocks
    return [{key: block[key] for key in keys} for block in best]


def compact(values: list[Any]) -> str | list[Any]:
    """A range as "0..11"."""
    if len(values) > 2 and values == list(range(values[0], values[0] + len(values))):
        return f"{values[0]}..{values[-1]}"
    return values


def leave_out(facts: Facts, shared: Facts) -> Facts:
    """The facts that `shared` does not state already."""
    own = {key: value for key, value in facts.items() if shared.get(key) != value}
    for key in ("site", "out_site"):
        if key in own:
            own[key] = leave_out(own[key], shared.get(key, {}))
    return own


def fill(value: Any, known: Facts) -> Any:
    """Put values into placeholders; a text of nothing but one becomes its value."""
    if isinstance(value, dict):
        return {key: fill(item, known) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if value[:1] == "{" and value[1:-1] in known:
        return known[value[1:-1]]
    return re.sub(r"\{(\w+)\}", lambda found: str(known.get(found[1], found[0])), value)


def on_one_line(item: Any) -> str:
    """YAML in flow style."""
    text = yaml.safe_dump(
        item, sort_keys=False, default_flow_style=True, width=100_000
    ).removesuffix("...\n")
    return text.strip()


def check(path: Path, rows: list[Facts], seconds: dict[str, float]) -> None:
    """Exit unless a file expands to these rows, once each, and no others; add up the time."""
    start = time.perf_counter()
    Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    release = Release.model_validate(yaml.load(path.read_text(encoding="utf-8"), Loader))
    seconds["read"] += time.perf_counter() - start
    start = time.perf_counter()
    entries = expand(release)  # refuses an id that stands twice
    seconds["expand"] += time.perf_counter() - start
    stated = {row["id"]: row for row in rows}
    if entries.keys() != stated.keys() or len(stated) != len(rows):
        odd = sorted(entries.keys() ^ stated.keys())[:3]
        sys.exit(f"{path}: {len(entries)} ids, {len(rows)} stated, such as {odd}")
    for key, row in stated.items():
        entry = entries[key]
        layer = re.search(r"(?:blocks\.|layer_?|[-/]L|small_L)(\d+)", row["path"])
        number = int(layer[1]) if layer else entry.layer
        ours = (entry.release, entry.format, entry.source, entry.path, entry.layer)
        theirs = (row["release"], row["format"], f"hf://{row['repo']}", row["path"], number)
        facts = [(name, getattr(entry, name), row.get(name)) for name in GIVEN]
        if ours != theirs or any(mine != given for _, mine, given in facts):
            sys.exit(f"{path}: {key}: {ours} is not {theirs}, or one of {facts}")
        if re.search(r"\{\w+\}", str(entry.to_json())):
            sys.exit(f"{path}: {key}: a placeholder without a value")


if __name__ == "__main__":
    main()
