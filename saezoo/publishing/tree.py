"""From folders to the tree that is published: the files of each SAE, what is made of them, and the
row that gives it a name.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saezoo.check import GOLDEN, GOLDEN_TOKENS, decided_tokens, write_golden
from saezoo.config import Origin, SAEConfig
from saezoo.convert import SIZES, convert_weights, proof_inputs
from saezoo.entry import Entry
from saezoo.errors import CannotConvert, PublishError, RegistryError, SaezooError
from saezoo.figure import plot_density
from saezoo.files import sha256_of
from saezoo.fill import load_plain
from saezoo.formats import Weights, native
from saezoo.manifest import read_manifest
from saezoo.names import parse_name
from saezoo.publishing.card import PLOT, Shown, write_card
from saezoo.publishing.merge import merge_manifest
from saezoo.publishing.sources import NEEDED, Source
from saezoo.publishing.staged import CARD, MANIFEST, Staged
from saezoo.registry import find_registered, release_names
from saezoo.sae import build_sae
from saezoo.stanza import id_key, row_of
from saezoo.stats import STATS, stats_of


@dataclass(frozen=True)
class Place:
    """Where a tree goes, and what stands there."""

    release: str
    """The first half of the names."""
    repo: str | None
    """org/name on the Hub; None: a folder."""
    readme: str | None = None
    manifest: str | None = None

    def name_of(self, entry: Entry) -> str:
        """What `load_sae` takes, once it is there."""
        if _is_registered(self.release, entry):
            return f"{self.release}/{entry.id}"
        if self.repo is None:
            return f"./{self.release}#{entry.id}"
        return f"hf://{self.repo}/{entry.path}" if entry.path else f"hf://{self.repo}"


@dataclass(frozen=True)
class Tree:
    """What was made of sources: files, and what is said of each SAE."""

    staged: Staged
    rows: list[dict[str, Any]]
    """Of the manifest."""
    names: list[str]
    """What `load_sae` takes, one for each row."""


def stage(
    sources: Sequence[Source],
    place: Place,
    exports: Sequence[str],
    work: Path,
    others: Sequence[Shown] = (),
) -> Tree:
    """The tree of these sources; what is not in their folders is made in `work`.

    others: SAEs that are there already, for the card.

    Raises CannotConvert where another layout cannot express one, MissingExtra without matplotlib,
    PublishError for a README.md or saezoo.yaml that has no place for ours.
    """
    files: dict[str, Path] = {}
    shown, rows = [], []
    if place.manifest is not None:
        _refuse_unlawful(place.manifest, place, "that is there")
    called = ids_by_path(place.manifest)
    for source in (replace(item, called=called.get(item.path, "")) for item in sources):
        own = _files_of(source, exports, work / "made" / (source.path or "."))
        files |= {_join(source.path, name): file for name, file in own.items()}
        entry = _entry(source, own)
        rows.append(row_of(entry))
        shown.append(show(source.cfg, entry, place, own, exports))
    manifest = merge_manifest(place.manifest, place.release, _about(sources), rows)
    _refuse_unlawful(manifest, place, "with these SAEs in it")
    together = sorted([*shown, *others], key=lambda item: id_key(item.path))
    names = {
        CARD: write_card(_title(place, together), together, place.readme).encode(),
        MANIFEST: manifest.encode(),
    }
    return Tree(Staged(files, names), rows, [item.name for item in shown])


def _refuse_unlawful(manifest: str, place: Place, which: str) -> None:
    """Raise PublishError for what nobody could read as a live zoo."""
    home = f"hf://{place.repo}" if place.repo else "here"
    try:
        read_manifest(manifest.encode(), MANIFEST, home)
    except RegistryError as error:
        raise PublishError(f"the {MANIFEST} {which}: {error}") from None


def ids_by_path(manifest: str | None) -> dict[str, str]:
    """The ids of the SAEs that a saezoo.yaml has in its own repo, by their paths."""
    return {str(row.get("path", "")): str(row.get("id")) for row in rows_there(manifest)}


def rows_there(manifest: str | None) -> list[dict[str, Any]]:
    """The rows of a saezoo.yaml that are in its own repo, as they stand there. Raises PublishError
    for what is no release.
    """
    if manifest is None:
        return []
    try:
        listed = load_plain(manifest, MANIFEST).get("saes") or []
    except SaezooError as error:
        raise PublishError(f"the {MANIFEST} that is there is none of a release: {error}") from None
    # what is no row, the merge refuses
    return [row for row in listed if isinstance(row, dict) and "source" not in row]


def show(
    cfg: SAEConfig, entry: Entry, place: Place, files: Container[str], exports: Sequence[str]
) -> Shown:
    """An SAE as the card has it. files: the names of those in its own folder."""
    return Shown(
        cfg,
        place.name_of(entry),
        id=entry.id or "",
        path=entry.path,
        repo=place.repo,
        exports=tuple(exports),
        plot=PLOT in files,
        golden=GOLDEN in files,
        stats=STATS in files,
    )


def _title(place: Place, shown: Sequence[Shown]) -> str:
    if len(shown) > 1 or not shown[0].path:
        return place.release
    return f"{place.release}/{shown[0].id}"


def _about(sources: Sequence[Source]) -> str:
    models = dict.fromkeys(s.cfg.site.model for s in sources if s.cfg.site and s.cfg.site.model)
    kind = "Transcoders" if all(s.cfg.is_transcoder for s in sources) else "Sparse autoencoders"
    return f"{kind} of {', '.join(models)}." if models else f"{kind}."


def _files_of(source: Source, exports: Sequence[str], made: Path) -> dict[str, Path]:
    """The files of one SAE, by their names in its folder."""
    made.mkdir(parents=True, exist_ok=True)
    files = {name: source.folder / name for name in NEEDED}
    weights = source.weights()
    if source.changed:
        native.write_config(source.cfg, made)
        files[native.CONFIG] = made / native.CONFIG
    if (source.folder / GOLDEN).is_file():
        files[GOLDEN] = source.folder / GOLDEN
    elif source.cfg.custom is None:
        make_golden(weights, made)
        files[GOLDEN] = made / GOLDEN
    stats = source.folder / STATS
    if stats.is_file():
        files[STATS] = stats
        density = stats_of(stats, source.cfg.d_sae).get("density")
        if density is not None:
            plot_density(density, made / PLOT)
            files[PLOT] = made / PLOT
    for name in exports:
        try:
            proof = convert_weights(weights, made / name, name, where=source.where)
        except CannotConvert as error:
            raise CannotConvert(f"{source.where}: {error}; nothing was published") from None
        for file in sorted(proof.folder.rglob("*")):
            if file.is_file():
                files[file.relative_to(made).as_posix()] = file
    return files


def make_golden(weights: Weights, folder: Path) -> None:
    """Golden outputs for seeded inputs, where the trainer left none of real activations."""
    assert isinstance(weights.cfg, SAEConfig)
    sae = build_sae(weights.cfg, weights.tensors)
    x = torch.cat(proof_inputs(sae.d_in, torch.float32))
    # some of each size
    mixed = x.reshape(len(SIZES), -1, sae.d_in).transpose(0, 1).reshape(-1, sae.d_in)
    write_golden(sae, decided_tokens(sae, mixed)[:GOLDEN_TOKENS], folder)


def _entry(source: Source, files: Mapping[str, Path]) -> Entry:
    cfg, facts = source.cfg, source.cfg.metrics or {}
    origin = cfg.origin or Origin()
    fvu = _known(facts, "fvu")
    return Entry(
        id=source.id,
        format="native",
        source="",
        path=source.path,
        sha256={native.WEIGHTS: sha256_of(files[native.WEIGHTS])},
        size=sum(files[name].stat().st_size for name in NEEDED),
        d_in=cfg.d_in,
        d_sae=cfg.d_sae,
        k=cfg.k,
        l0=_known(facts, "l0"),
        variance_explained=None if fvu is None else round(1 - fvu, 4),
        licence=origin.licence,
        author=origin.author,
        paper=origin.paper,
        site=cfg.site,
        out_site=cfg.out_site,
    )


def _known(facts: Mapping[str, Any], key: str) -> float | None:
    value = facts.get(key)
    return round(value, 4) if isinstance(value, int | float) else None


def _is_registered(release: str, entry: Entry) -> bool:
    """Whether the registry knows these very weights by this name."""
    if release not in release_names():
        return False
    try:
        known = find_registered(parse_name(f"{release}/{entry.id}")).sha256
    except SaezooError:
        return False
    return known is not None and known == entry.sha256


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
