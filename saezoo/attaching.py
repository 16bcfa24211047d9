"""Attach SAEs to a language model: see their features, or put their reconstruction in the place of
what they read.

    with saezoo.attach(model, sae) as run:              # splice: the model goes on with sae(x)
        logits = model(ids).logits
    with saezoo.attach(model, sae, "observe") as run:   # the model is left as it is
        model(ids)
    run.features                                        # of the last forward pass
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from saezoo.config import Site
from saezoo.errors import CaptureError, InputError
from saezoo.guard import Guard, check_host
from saezoo.hooks import See, Watch
from saezoo.sae import CHOOSING, SAE
from saezoo.sites import Place, find_place
from saezoo.sparse import SparseFeatures

Stored = Literal["features", "x", "x_hat", "target"]
KINDS: tuple[Stored, ...] = ("features", "x", "x_hat", "target")
FEATURES: tuple[Stored, ...] = ("features",)


@dataclass
class Seen:
    """What one SAE saw in one forward pass; None for what was not to be stored."""

    features: Tensor | SparseFeatures | None = None
    """SparseFeatures for topk and groupmax, dense (…, d_sae) for the others."""
    x: Tensor | None = None
    """(…, d_in): what the SAE read."""
    x_hat: Tensor | None = None
    """(…, d_out): what the SAE makes of x, its skip and its normalisation included."""
    target: Tensor | None = None
    """(…, d_out): what x_hat is to be near: x, and for a transcoder what the model has at its
    output site.
    """


class Run:
    """What attached SAEs saw.

    `run.features`, `run.x`, `run.x_hat` and `run.target` are of the last forward pass that ended:
    one value where one SAE was given, a list or dict where a list or dict of them was. `run.passes`
    has all of them, oldest first, when attached with keep="all", else the last alone; an entry is
    {key: Seen}, its keys 0, 1 … for a list, or those of the dict.
    """

    def __init__(self, shape: Literal["one", "list", "dict"], stored: Collection[Stored]) -> None:
        self.passes: list[dict[Any, Seen]] = []
        self._shape = shape
        self._stored = stored

    @property
    def features(self) -> Any:
        """SparseFeatures for topk and groupmax, dense (…, d_sae) for the others."""
        return self._last("features")

    @property
    def x(self) -> Any:
        """(…, d_in): what the SAE read."""
        return self._last("x")

    @property
    def x_hat(self) -> Any:
        """(…, d_out): the complete reconstruction."""
        return self._last("x_hat")

    @property
    def target(self) -> Any:
        """(…, d_out): what x_hat is to be near."""
        return self._last("target")

    def _last(self, name: Stored) -> Any:
        if name not in self._stored:
            raise CaptureError(f"{name} was not stored: attach(…, store=({name!r},))")
        if not self.passes:
            raise CaptureError("no forward pass of the model has ended yet")
        values = {key: getattr(seen, name) for key, seen in self.passes[-1].items()}
        if self._shape == "dict":
            return values
        return values[0] if self._shape == "one" else list(values.values())


@contextmanager
def attach(
    model: nn.Module,
    sae: SAE | Sequence[SAE] | Mapping[Any, SAE],
    mode: Literal["splice", "observe"] = "splice",
    error_term: bool = False,
    *,
    site: Site | None = None,
    out_site: Site | None = None,
    store: Collection[Stored] = FEATURES,
    keep: Literal["last", "all"] = "last",
    guard: Guard = "error",
    tokenizer: Any = None,
) -> Iterator[Run]:
    """Attach one SAE, or several as a list or dict, to a HuggingFace or TransformerLens model, each
    at its own site.

    mode: "splice" replaces the site's tensor by sae(x) at every position; a transcoder's output
    site gets what it makes of its captured input. "observe" changes nothing. error_term: with
    splice, x̂ + (x - x̂), the error without gradient; its value is x itself, bit for bit.
    site, out_site: instead of the spec's, for one SAE. store: what a Run keeps, of "features", "x",
    "x_hat", "target". keep: the last forward pass, or all of them (`generate` with a cache is one
    for each token). guard, tokenizer: see `saezoo.guard.check_host`.

    Gradients flow as torch.is_grad_enabled() says. Raises CaptureError when a site is not found,
    has another width, carries NaN, or did not run in a forward pass of the model. On leaving
    nothing is hooked, whatever happened.
    """
    shape, saes = _as_dict(sae)
    if mode not in ("splice", "observe"):
        raise InputError(f"mode {mode!r}: there are 'splice' and 'observe'")
    if unknown := sorted(set(store) - set(KINDS)):
        raise InputError(f"store={unknown!r}: there are {', '.join(KINDS)}")
    if keep not in ("last", "all"):
        raise InputError(f"keep {keep!r}: there are 'last' and 'all'")
    if (site or out_site) and shape != "one":
        raise InputError("site and out_site are for one SAE; several are attached by their own")
    run = Run(shape, store)
    now: dict[Any, Seen] = {}

    def ended() -> None:
        # in the order in which the SAEs were given, not in that of the layers
        done = {key: now[key] for key in saes}
        run.passes = [*run.passes, done] if keep == "all" else [done]
        now.clear()

    watch = Watch(ended)
    parts = []
    for key, one in saes.items():
        places = find_places(model, one, site, out_site, writes=mode == "splice")
        check_host(model, one.cfg, guard=guard, site=site, tokenizer=tokenizer)
        parts.append(_Attached(key, one, *places, mode == "splice", error_term, store, watch, now))
    _refuse_twice(parts, mode)
    with watch.hooked(model, [pair for part in parts for pair in part.pairs()]):
        yield run


@dataclass
class _Attached:
    """One SAE at its places."""

    key: Any
    sae: SAE
    place: Place
    out_place: Place | None
    splice: bool
    error_term: bool
    store: Collection[Stored]
    watch: Watch
    now: dict[Any, Seen]
    read: tuple[Tensor, Tensor | SparseFeatures] | None = None
    """Of a transcoder: what it read in this pass and has not written yet."""

    def pairs(self) -> list[tuple[Place, See]]:
        """What is to be hooked."""
        if self.out_place is None:
            return [(self.place, self._see)]
        return [(self.place, self._see_input), (self.out_place, self._see_output)]

    def _see(self, x: Tensor) -> Tensor | None:
        return self._write(x, self._encode(x), target=x)

    def _see_input(self, x: Tensor) -> None:
        self.read = x, self._encode(x)

    def _see_output(self, target: Tensor) -> Tensor | None:
        if self.read is None:
            raise CaptureError(
                f"{self.out_place.name if self.out_place else ''} ran before {self.place.name}, "
                "which the transcoder reads"
            )
        read, self.read = self.read, None
        return self._write(*read, target=target)

    def _encode(self, x: Tensor) -> Tensor | SparseFeatures:
        check_tensor(x, self.sae.d_in, self.place)
        chosen = self.sae.cfg.architecture in CHOOSING
        return self.sae.encode_sparse(x) if chosen else self.sae.encode(x)

    def _write(
        self, x: Tensor, features: Tensor | SparseFeatures, *, target: Tensor
    ) -> Tensor | None:
        """Store what is wanted; the tensor that goes on, None for as it is."""
        x_hat = None
        if self.splice or "x_hat" in self.store:
            x_hat = self.sae.decode(features, x)
            if target.shape != x_hat.shape:
                place = self.out_place or self.place
                raise CaptureError(
                    f"{place.name} is {tuple(target.shape)}, but the SAE writes "
                    f"{tuple(x_hat.shape)}: is this its output site?"
                )
        if self.watch.in_pass:
            found = {"features": features, "x": x, "x_hat": x_hat, "target": target}
            self.now[self.key] = Seen(**{name: found[name] for name in self.store})  # type: ignore[arg-type]
        if not self.splice or x_hat is None:
            return None
        # the difference is exactly zero and carries the gradient: the value is the target's own
        return target.detach() + (x_hat - x_hat.detach()) if self.error_term else x_hat


def check_tensor(x: Tensor, d_in: int, place: Place) -> None:
    """Raise CaptureError unless x is (…, d_in) and finite."""
    if x.shape[-1:] != (d_in,):
        raise CaptureError(
            f"{place.name} is {x.shape[-1]} wide, but the SAE reads {d_in}: another model, or "
            "another site"
        )
    if not bool(x.isfinite().all()):
        raise CaptureError(f"{place.name} carries NaN or infinity, which no SAE can read")


def _as_dict(sae: Any) -> tuple[Literal["one", "list", "dict"], dict[Any, SAE]]:
    """How the SAEs were given, and all of them by key."""
    if isinstance(sae, SAE):
        return "one", {0: sae}
    shape: Literal["list", "dict"] = "dict" if isinstance(sae, Mapping) else "list"
    if not isinstance(sae, Mapping | Sequence) or not sae:
        raise InputError(f"expected an SAE, or a list or dict of them, got {sae!r:.60}")
    saes = dict(sae) if isinstance(sae, Mapping) else dict(enumerate(sae))
    if wrong := [type(one).__name__ for one in saes.values() if not isinstance(one, SAE)]:
        raise InputError(f"expected SAEs, got a {wrong[0]} among them")
    return shape, saes


def find_places(
    model: nn.Module, sae: SAE, site: Site | None, out_site: Site | None, *, writes: bool
) -> tuple[Place, Place | None]:
    """Where one SAE reads and, for a transcoder, where it writes. Raises CaptureError, also for a
    transcoder that does not say where it writes, if it is to.
    """
    site, out_site = site or sae.cfg.site, out_site or sae.cfg.out_site
    if site is None:
        raise CaptureError(
            "the SAE does not say which site it reads: give "
            "site=Site(module='model.layers.15', side='output')"
        )
    if sae.cfg.is_transcoder and out_site is None and writes:
        raise CaptureError(
            "the transcoder does not say where its output goes: give out_site=Site(module=…)"
        )
    place = find_place(model, site)
    return place, find_place(model, out_site) if out_site is not None else None


def _refuse_twice(parts: list[_Attached], mode: str) -> None:
    """Two reconstructions cannot both be in one place."""
    taken: set[tuple[int, str]] = set()
    for part in parts if mode == "splice" else []:
        place = part.out_place or part.place
        key = (id(place.module), place.side)
        if key in taken:
            raise CaptureError(f"two SAEs would replace {place.name}: splice one, or observe both")
        taken.add(key)
