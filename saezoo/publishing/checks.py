"""What is not published: weights that are not finite, a spec that leaves something out, numbers
that nobody measured, secrets and paths of this machine. A line for each reason.
"""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saezoo.build import check_weights
from saezoo.check import GOLDEN, golden_difference
from saezoo.config import SAEConfig
from saezoo.errors import SaezooError
from saezoo.formats import Weights, native
from saezoo.formats._tensors import read_json, refuse_not_finite
from saezoo.metrics import VERSION
from saezoo.numerics import TOLERANCE
from saezoo.publishing.sources import Source
from saezoo.publishing.staged import CARD, MANIFEST, Staged
from saezoo.sae import build_sae
from saezoo.stats import STATS, stats_of

KNOWN = (native.CONFIG, native.WEIGHTS, GOLDEN, STATS, CARD, MANIFEST, "density.png")
PATH = re.compile(r"[\w.+-]+(/[\w.+-]+)*")
"""A path in a repo, which is an id too."""
SECRETS = (
    ("a HuggingFace token", re.compile(r"\bhf_(?:oauth_|jwt_?)?[A-Za-z0-9.-]{20,}")),
    ("a GitHub token", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}")),
    ("an API key", re.compile(r"\bsk-[A-Za-z0-9_-]{20,}")),
    ("an AWS key", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("a Slack token", re.compile(r"\bxox[baprs]-[\w-]{10,}")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("a password in a URL", re.compile(r"://[^/\s:@]+:[^/\s@]+@")),
    (
        "a key or password",
        re.compile(
            r"\b(?:api_?key|secret|password|passwd|auth_?token|access_?token|token)\b[\"']?\s*[:=]"
            r"\s*[\"']?[\w+/=-]{16,}",
            re.IGNORECASE,
        ),
    ),
)
FOLDERS = (
    "Users|afs|content|data|gpfs|home|kaggle|lustre|media|mnt|net|nfs|opt|private|root|scratch"
)
LOCAL = re.compile(
    rf"(?<![\w/.:~>-])(?:/(?:{FOLDERS}|srv|tmp|usr|var|work|workspace)/[^\s\"'`)<>\]]+"
    r"|~/[^\s\"'`)<>\]]+|[A-Za-z]:\\[^\s\"'`)<>\]]+|file://[^\s\"'`)<>\]]+)"
)
"""A path of somebody's machine within a text."""
WHOLE = re.compile(r"/\S+|~(/.*)?|[A-Za-z]:[\\/].*|\\\\.*|file:.*")
"""A value that is one."""
TEXT = (".json", ".yaml", ".yml", ".md", ".txt")


def find_problems(sources: Sequence[Source], *, without_metrics: bool = False) -> list[str]:
    """A line for each thing that is wrong with these folders; each says what to do."""
    problems = []
    for source in sources:
        problems += [f"{source.where}: {problem}" for problem in _problems(source, without_metrics)]
    ids = [source.id for source in sources]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    return problems + [f"two SAEs would both be called {one!r}: give --path" for one in twice]


def _problems(source: Source, without_metrics: bool) -> Iterator[str]:
    cfg = source.cfg
    if source.path and (not PATH.fullmatch(source.path) or _hidden(source.path)):
        yield (
            f"the path {source.path!r}: in a repo it is letters, digits, `.`, `_`, `+`, `-` and "
            "`/`, and no part begins with a dot"
        )
    yield from _spec(cfg)
    if cfg.origin is None or not cfg.origin.licence:
        yield "no licence: give --licence, such as --licence Apache-2.0, or `origin` in the recipe"
    if not without_metrics:
        yield from _metrics(cfg)
        if cfg.custom is None and not (source.folder / STATS).is_file():
            yield (
                f"no {STATS} (how often each feature fires): saezoo's trainer writes it; without "
                "it say --without-metrics"
            )
    yield from _files(source)
    said = dict(_strings(cfg.to_json()))
    if not source.changed:
        said |= dict(_strings(read_json(source.folder / native.CONFIG)))
    yield from leaks(said, native.CONFIG)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _spec(cfg: SAEConfig) -> Iterator[str]:
    """What another person needs to use it, and the spec does not say."""
    lacking = []
    if cfg.site is None or cfg.site.model is None:
        lacking.append("site.model")
    if cfg.site is None or not (cfg.site.module or cfg.site.hook_name):
        lacking.append("site.module or site.hook_name")
    if cfg.is_transcoder and cfg.out_site is None:
        lacking.append("out_site")
    if cfg.tokens is None:
        lacking.append("tokens")
    else:
        keys = ("prepend_bos", "context", "skip_first", "skip_special")
        lacking += [f"tokens.{key}" for key in keys if getattr(cfg.tokens, key) is None]
    if lacking:
        yield f"{native.CONFIG} does not say {', '.join(lacking)}: write it there"


def _metrics(cfg: SAEConfig) -> Iterator[str]:
    facts = cfg.metrics or {}
    lacking = [key for key in ("fvu", "l0", "dead_fraction", "tokens") if key not in facts]
    hint = (
        f"write what `saezoo eval --json` measures into {native.CONFIG}, or say --without-metrics"
    )
    if lacking:
        yield f"{native.CONFIG} has no metrics {', '.join(lacking)}: {hint}"
        return
    version = facts.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        yield (
            f"its metrics are of version {version!r} of the definitions, not of 1 to {VERSION} "
            f"that saezoo.metrics has: {hint}"
        )
    for key, most in (("fvu", math.inf), ("l0", cfg.d_sae), ("dead_fraction", 1), ("tokens", 1e18)):
        value = facts[key]
        if not isinstance(value, int | float) or not 0 <= value <= most:
            yield f"its {key} is {value!r}, which no SAE of {cfg.d_sae:,} features has: {hint}"


def _files(source: Source) -> Iterator[str]:
    """What is wrong with the weights and what belongs to them."""
    try:
        weights = source.weights()
        check_weights(weights.cfg, weights.tensors, native.WEIGHTS)
        refuse_not_finite(weights.tensors, native.WEIGHTS)
    except (SaezooError, OSError) as error:
        yield f"{error}: it cannot be published so"
        return
    yield from _golden(source, weights)
    path = source.folder / STATS
    if path.is_file():
        try:
            stats_of(path, source.cfg.d_sae)
        except SaezooError as error:
            yield f"{STATS}: {error}"


def _golden(source: Source, weights: Weights) -> Iterator[str]:
    path = source.folder / GOLDEN
    if not path.is_file() or source.cfg.custom is not None:
        return
    again = f"take {GOLDEN} away, and one is made"
    try:
        difference = golden_difference(build_sae(source.cfg, weights.tensors), path)
    except SaezooError as error:
        yield f"{error}; {again}"
        return
    if difference > TOLERANCE[torch.float32]:
        yield f"{GOLDEN} is not of these weights (largest difference {difference:.1e}); {again}"


def find_leaks(staged: Staged, before: Mapping[str, str | None], token: str | None) -> list[str]:
    """A line for each secret or path of this machine in what is about to be published.

    before: README.md and saezoo.yaml as they are there, whose own lines are not ours. token: one
    that must be nowhere.
    """
    problems: list[str] = []
    for name, path in staged.files.items():
        if name.endswith(TEXT):
            text = path.read_text(encoding="utf-8", errors="replace")
        elif name.endswith(".safetensors"):
            text = _header_words(path)
        else:
            continue
        said = _texts(text)
        problems += leaks(said, name)
        problems += [f"{name}: holds the token itself"] * bool(token and token in text)
    for name, data in staged.name_files.items():
        text = data.decode("utf-8")
        theirs = set((before.get(name) or "").splitlines())
        ours = {f"line {at}": line for at, line in enumerate(text.splitlines(), 1)}
        problems += leaks({at: line for at, line in ours.items() if line not in theirs}, name)
        problems += [f"{name}: holds the token itself"] * bool(token and token in text)
    return problems


def leaks(said: Mapping[str, str], where: str) -> Iterator[str]:
    """What looks like a secret, whose words are not repeated, or a path of this machine.

    said: texts by the place where they stand.
    """
    for place, text in said.items():
        for kind, pattern in SECRETS:
            # a word before a value makes it a secret: `password: …`
            if pattern.search(text) or pattern.search(f"{place.rpartition('.')[2]}: {text}"):
                yield f"{where}: {place}: what looks like {kind} stands there: take it out"
                break
        found = text if WHOLE.fullmatch(text.strip()) else LOCAL.search(text)
        if found:
            shown = found if isinstance(found, str) else found[0].rstrip(".,:;")
            yield (
                f"{where}: {place} is {shown[:80]!r}, a path of this machine: write what others "
                "know it by"
            )


def _texts(text: str) -> dict[str, str]:
    """The strings of a JSON document, or the lines of anything else."""
    try:
        return dict(_strings(json.loads(text)))
    except ValueError:
        return {f"line {at}": line for at, line in enumerate(text.splitlines(), 1)}


def _strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(place, text) of every string in plain values, and of every key."""
    if isinstance(value, str):
        yield place or "it", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{place}.{key}" if place else str(key)
            yield f"{inner} (the key)", str(key)
            yield from _strings(item, inner)
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _strings(item, f"{place}.{at}")


def _header_words(path: Path) -> str:
    """The header of a safetensors file: names, and what its writer put in beside them."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(min(length, 2**26)).decode("utf-8", "replace")


def left_out(sources: Sequence[Source], exports: Sequence[str]) -> list[str]:
    """What lies in the folders and is not needed, so that it is not published."""
    found = []
    for source in sources:
        for item in sorted(source.folder.iterdir()):
            if item.name not in KNOWN and item.name not in exports:
                found.append(f"{source.where}/{item.name}")
    return found
