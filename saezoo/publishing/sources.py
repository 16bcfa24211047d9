"""The native folders that are meant to be published: one, or all that lie below a folder."""

from dataclasses import dataclass
from pathlib import Path

from saezoo.config import Origin, SAEConfig
from saezoo.errors import CannotConvert, NotPublishable, SaezooError
from saezoo.formats import Weights, native
from saezoo.formats._tensors import read_json
from saezoo.stanza import id_key

NEEDED = (native.CONFIG, native.WEIGHTS)


@dataclass(frozen=True)
class Source:
    """One native folder that is to be published."""

    folder: Path
    path: str
    """Where it goes, in the repo; empty: to its root."""
    cfg: SAEConfig
    """As it is published: with the licence."""
    changed: bool = False
    """Whether that is another spec than the folder's."""
    called: str = ""
    """The id that it has at its place already."""

    def weights(self) -> Weights:
        """The tensors, mapped. Raises FormatError for files that are not what they must be."""
        return Weights(self.cfg, native.read(self.folder, None).tensors)

    @property
    def where(self) -> str:
        """How problems call it."""
        return self.folder.name

    @property
    def id(self) -> str:  # noqa: A003
        """The second half of its name."""
        if self.called or self.path:
            return self.called or self.path
        site = self.cfg.site
        if site is None or site.layer is None:
            return "sae"
        return f"layer_{site.layer}_{site.point}" if site.point else f"layer_{site.layer}"


def find_sources(folder: Path, path: str | None, licence: str | None) -> list[Source]:
    """The native folder, or those below it, in the order of their paths.

    path: where in the repo; of many, what comes before each one's own. licence: instead of what
    their specs say. Raises NotPublishable where there is none.
    """
    if not folder.is_dir():
        raise NotPublishable([f"{folder}: no such folder"])
    found = [folder] if is_native(folder) else sorted(_below(folder))
    if not found:
        raise NotPublishable(
            [
                f"{folder}: neither a native folder nor one of such; `saezoo convert {folder} "
                "./native` makes one of any SAE"
            ]
        )
    sources, problems = [], []
    for item in found:
        own = item.relative_to(folder).as_posix()
        parts = [part.strip("/") for part in (path or "", "" if own == "." else own)]
        try:
            sources.append(_source(item, "/".join(filter(None, parts)), licence))
        except SaezooError as error:
            problems.append(str(error))
    if problems:
        raise NotPublishable(problems)
    return sorted(sources, key=lambda source: id_key(source.path))


def is_native(folder: Path) -> bool:
    """Whether a folder says that it is one of saezoo's own."""
    try:
        return "saezoo_format" in read_json(folder / native.CONFIG)
    except (SaezooError, OSError):
        return False


def _below(folder: Path) -> list[Path]:
    """Native folders below one, not those of runs, hidden ones, or where links lead."""
    found = []
    for item in folder.iterdir():
        if item.is_symlink() or not item.is_dir() or item.name.startswith("."):
            continue
        if item.name.endswith(".run"):
            continue
        found += [item] if is_native(item) else _below(item)
    return found


def _source(folder: Path, path: str, licence: str | None) -> Source:
    cfg = native.read_config(folder)
    if not isinstance(cfg, SAEConfig):
        raise CannotConvert(
            f"{folder.name}: is {cfg.title}; so far only SAEs of one layer can be published"
        )
    origin = cfg.origin or Origin()
    if licence is None or licence == origin.licence:
        return Source(folder, path, cfg)
    stated = cfg.model_copy(update={"origin": origin.model_copy(update={"licence": licence})})
    return Source(folder, path, stated, changed=True)
