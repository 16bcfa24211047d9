"""The model card: the one text about an SAE, whether it was just trained or is published.

Front matter by huggingface_hub's ModelCardData; the text says how to load it, what it computes, on
what it was trained, what was measured by which definitions, and where its limits are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from saezoo.config import SAEConfig
from saezoo.metrics import VERSION
from saezoo.publishing.front import front_matter, unique
from saezoo.publishing.merge import merge_card
from saezoo.publishing.words import (
    host_of,
    measured_rows,
    settings,
    sparsity,
    spec_in_words,
    token_rule,
    training,
    what_it_is,
    where_it_reads,
)

PLOT = "density.png"
SHOWN_PLOTS = 12
"""Density plots on a card; of more SAEs, the table links to each."""


@dataclass(frozen=True)
class Shown:
    """One SAE, as a card is to show it."""

    cfg: SAEConfig
    name: str
    """What `load_sae` takes."""
    id: str = ""
    path: str = ""
    """Its folder, seen from the card; empty: the card lies beside it."""
    repo: str | None = None
    """org/name, where it is on the Hub."""
    exports: tuple[str, ...] = ()
    """Other formats of it, each in a folder of that name."""
    plot: bool = False
    golden: bool = True
    stats: bool = True

    def below(self, file: str) -> str:
        """A file or folder of this SAE, seen from the card."""
        return f"{self.path}/{file}" if self.path else file


def write_card(title: str, saes: Sequence[Shown], existing: str | None = None) -> str:
    """README.md about these SAEs, its text between markers; in an `existing` one nothing else is
    touched. Raises PublishError for one that has no place for it.
    """
    front = front_matter(
        title, [sae.cfg for sae in saes], unique(n for s in saes for n in s.exports)
    )
    return merge_card(existing, front, card_text(title, saes))


def card_text(title: str, saes: Sequence[Shown]) -> str:
    """The text of the card, as markdown."""
    several = len(saes) > 1
    parts = [
        f"# {title}",
        _intro(saes),
        "## Load one" if several else "## Load it",
        _loading(saes),
        *(["## The SAEs", _table(saes)] if several else []),
        "## What they compute" if several else "## What it computes",
        _grouped(saes, lambda sae: _bullets(spec_in_words(sae.cfg))),
        "## Tokens",
        _grouped(saes, lambda sae: _bullets(token_rule(sae.cfg.tokens))),
        "## Training",
        _grouped(saes, _training),
        "## Measured on held-out documents",
        _measured(saes),
        *_plots(saes),
        "## Limits",
        _limits(saes),
        f"Licence: {', '.join(_licences(saes))}.",
    ]
    # markers of ours in somebody's notes would end the text in its middle
    return "\n\n".join(part for part in parts if part).replace("<!--", "&lt;!--")


def _intro(saes: Sequence[Shown]) -> str:
    first = saes[0].cfg
    if len(saes) == 1:
        what = what_it_is(first)
        article = "An" if what[0] in "aeiou" else "A"
        host = host_of(first)
        return f"{article} {what},{where_it_reads(first)}{f' of {host}' if host else ''}."
    hosts = unique(host_of(sae.cfg) for sae in saes)
    kinds = unique(sae.cfg.architecture for sae in saes)
    return f"{len(saes)} sparse autoencoders ({', '.join(kinds)}) of {', '.join(hosts)}."


def _loading(saes: Sequence[Shown]) -> str:
    first = saes[0]
    code = [f'sae = load_sae("{first.name}")']
    lines = ["from saezoo import load_sae", ""]
    if first.cfg.custom is not None:
        module, _, cls = first.cfg.custom.name.partition(":")
        code = [f'sae = load_sae("{first.name}", custom={cls})']
        lines = [f"from {module} import {cls}  # its author's own code", *lines]
    else:
        code.append(
            f"features = sae.encode_sparse(x)  # x: (…, {first.cfg.d_in}) activations at the site"
        )
    parts = [_code(lines + code)]
    if first.repo is not None:
        parts.append(
            f"`saezoo check {first.name}` compares a download with what was published; "
            f"`saezoo zoo add hf://{first.repo}` pins this repo on a machine."
        )
    parts += [_export(first, name) for name in first.exports]
    return "\n\n".join(parts)


def _export(sae: Shown, name: str) -> str:
    """How one of the other layouts is loaded, by its own library."""
    folder = sae.below(name)
    at = {
        "saelens": ("from sae_lens import SAE", "SAE.from_pretrained", "SAE.load_from_disk"),
        "sparsify": (
            "from sparsify import SparseCoder",
            "SparseCoder.load_from_hub",
            "SparseCoder.load_from_disk",
        ),
    }.get(name)
    said = {"saelens": "SAELens"}.get(name, name)
    proof = "written by `saezoo convert`, which compared both on seeded inputs"
    if at is None:
        return f"`{folder}/` has it in the layout of {said}, {proof}."
    imported, hub, disk = at
    call = f'{hub}("{sae.repo}", "{folder}")' if sae.repo else f'{disk}("{folder}")'
    return f"With {said} (`{folder}/`, {proof}):\n\n" + _code([imported, "", f"sae = {call}"])


COLUMNS: tuple[tuple[str, Callable[[Shown], Any]], ...] = (
    ("id", lambda sae: f"`{sae.id}`"),
    ("layer", lambda sae: sae.cfg.site.layer if sae.cfg.site else None),
    ("site", lambda sae: sae.cfg.site.point if sae.cfg.site else None),
    ("architecture", lambda sae: sae.cfg.architecture),
    ("features", lambda sae: f"{sae.cfg.d_sae:,}"),
    ("on per token", lambda sae: sparsity(sae.cfg).removesuffix(" on per token")),
    ("FVU", lambda sae: _number(sae.cfg, "fvu", ".4f")),
    ("loss recovered", lambda sae: _number(sae.cfg, "loss_recovered", ".4f")),
    ("never fired", lambda sae: _number(sae.cfg, "dead_fraction", ".2%")),
    ("density", lambda sae: f"[plot]({sae.below(PLOT)})" if sae.plot else None),
)


def _table(saes: Sequence[Shown]) -> str:
    """A row an SAE; columns of which nothing is known are left out."""
    cells = {title: [value(sae) for sae in saes] for title, value in COLUMNS}
    shown = {title: values for title, values in cells.items() if any(v is not None for v in values)}
    if sum(sae.plot for sae in saes) <= SHOWN_PLOTS:
        shown.pop("density", None)
    titles = list(shown)
    numbers = {"layer", "features", "on per token", "FVU", "loss recovered", "never fired"}
    lines = [_row(titles), _row("---:" if title in numbers else "---" for title in titles)]
    lines += [
        _row("" if v is None else v for v in row) for row in zip(*shown.values(), strict=True)
    ]
    return "\n".join(lines)


def _number(cfg: SAEConfig, key: str, form: str) -> str | None:
    value = (cfg.metrics or {}).get(key)
    return f"{value:{form}}" if isinstance(value, int | float) else None


def _training(sae: Shown) -> str:
    text = _bullets(training(sae.cfg)) or "Nothing is stated."
    if chosen := settings(sae.cfg):
        import yaml

        text += "\n\n" + _code(yaml.safe_dump(chosen, sort_keys=False).splitlines(), "yaml")
    return text


def _measured(saes: Sequence[Shown]) -> str:
    measured = [sae for sae in saes if (sae.cfg.metrics or {}).get("fvu") is not None]
    if not measured:
        return "Nothing: its author published it without metrics."
    version = unique(str((sae.cfg.metrics or {}).get("version", VERSION)) for sae in measured)
    text = (
        f"The definitions are those of `saezoo.metrics`, version {', '.join(version)}. FVU, L0 and "
        "PCA leave out the tokens that training left out; the losses are over every position."
    )
    if len(saes) > 1:
        return f"{text} The table above has the main numbers, each `config.json` has all of them."
    rows = measured_rows(saes[0].cfg.metrics or {})
    table = [_row(("metric", "value")), _row(("---", "---:")), *map(_row, rows)]
    return f"{text}\n\n" + "\n".join(table)


def _plots(saes: Sequence[Shown]) -> list[str]:
    plotted = [sae for sae in saes if sae.plot]
    if not plotted or len(plotted) > SHOWN_PLOTS:
        return []
    images = [f"![density of the features]({sae.below(PLOT)})" for sae in plotted]
    if len(saes) == 1:
        return ["## How often features fire", *images]
    lines = []
    for at in range(0, len(plotted), 2):
        pair = slice(at, at + 2)
        lines += [_row(_two(f"`{sae.id}`" for sae in plotted[pair])), _row(_two(images[pair]))]
    lines.insert(1, _row(("---", "---")))
    return ["## How often features fire", "\n".join(lines)]


def _limits(saes: Sequence[Shown]) -> str:
    one = len(saes) == 1
    text = (
        "What was left out it has never seen: there its reconstruction means nothing."
        if one
        else "What was left out they have never seen: there their reconstructions mean nothing."
    )
    text += (
        " The numbers are of that host model, that site and text like that of the training; "
        "elsewhere `saezoo eval` measures them. What a feature stands for is nowhere claimed."
    )
    if any(sae.cfg.custom for sae in saes):
        return f"{text} Its architecture is its author's own, and so is the code that was measured."
    files = []
    if any(sae.stats for sae in saes):
        found = [(sae.cfg.metrics or {}).get("stats_tokens") for sae in saes]
        tokens = {count for count in found if isinstance(count, int)}
        some = " or ".join(f"{count:,}" for count in sorted(tokens)) or "some"
        files.append(
            f"`stats.safetensors` has `density` and `max_activation` of each feature over {some} "
            "training tokens"
        )
    if any(sae.golden for sae in saes):
        files.append("`golden.safetensors` has inputs and what the SAE makes of them")
    return f"{text}\n\n{'; '.join(files)}." if files else text


def _licences(saes: Sequence[Shown]) -> list[str]:
    found = unique((sae.cfg.origin.licence if sae.cfg.origin else None) or "" for sae in saes)
    return [licence or "not stated" for licence in found]


def _grouped(saes: Sequence[Shown], words: Callable[[Shown], str]) -> str:
    """What is said of all, once; of some, below their ids."""
    groups: dict[str, list[str]] = {}
    for sae in saes:
        groups.setdefault(words(sae), []).append(f"`{sae.id}`")
    if len(groups) == 1:
        return next(iter(groups))
    return "\n\n".join(f"{', '.join(ids)}:\n\n{text}" for text, ids in groups.items())


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _two(cells: Iterable[str]) -> list[str]:
    return [*cells, ""][:2]


def _code(lines: Sequence[str], language: str = "python") -> str:
    return "\n".join([f"```{language}", *lines, "```"])
