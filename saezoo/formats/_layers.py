"""What readers of formats with a file a layer share: which layers are there, and their specs."""

from collections.abc import Sequence
from pathlib import Path

from saezoo.config import Site
from saezoo.config_multi import MOST, CLTConfig
from saezoo.entry import Entry
from saezoo.errors import FormatError, MissingFile
from saezoo.formats import FORMATS
from saezoo.formats.gemma_scope import prefer


def layers_there(folder: Path, key: str, template: str) -> list[int]:
    """The layers that a folder has files of, which must be 0, 1, 2, … without a gap.

    Raises MissingFile for a gap, FormatError for more than any model has.
    """
    start, _, end = template.partition("{layer}")
    names = FORMATS[key].layer_files_in([item.name for item in folder.iterdir()])
    found = sorted(
        int(name[len(start) : -len(end)])
        for name in names
        if name.startswith(start) and name.endswith(end)
    )
    if not found:
        raise MissingFile(f"{folder}: has no {template.replace('{layer}', '0')}")
    if found[-1] >= MOST:
        raise FormatError(f"{folder}: layer {found[-1]} is more than any model has")
    if gaps := sorted(set(range(found[-1])) - set(found)):
        raise MissingFile(f"{folder}: has no {template.replace('{layer}', str(gaps[0]))}")
    return found


def expect_layers(there: Sequence[int], count: int, folder: Path) -> None:
    """Raise FormatError unless the files are those of all layers that the decoders are of."""
    if len(there) != count:
        raise FormatError(
            f"{folder}: has the files of {len(there)} layers, but the decoders are of {count}: "
            "fetch it again, or name one layer"
        )


def sites_for(stated: Site | None, found: Sequence[Site | None]) -> tuple[Site, ...] | None:
    """The sites that were found, what the registry states of all of them going first; None unless
    each is known.
    """
    sites = [prefer(stated, site) for site in found]
    known = tuple(site for site in sites if site is not None)
    return known if known and len(known) == len(sites) else None


def chosen(cfg: CLTConfig, layer: int | None, where: str) -> CLTConfig:
    """The spec of all layers, or of one. Raises ConfigError where that has no meaning."""
    return cfg if layer is None else cfg.alone(layer, where)


def stated_site(entry: Entry | None, key: str) -> Site | None:
    """What the registry says of all sites: not of which layer."""
    stated = getattr(entry, key) if entry is not None else None
    return None if stated is None else stated.model_copy(update={"layer": None})
