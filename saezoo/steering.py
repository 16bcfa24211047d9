"""Change a few features of an SAE while a model runs.

    with saezoo.steer(model, sae, {123: 4.0}):      # four times its largest known activation
        model.generate(**tokens)

Of f, what the SAE makes of x, and f', the same with a few features changed, only
decode(f') - decode(f) is added to the model's tensor: what the SAE cannot reconstruct stays, and
where nothing changes (add 0, scale 1, clamp at the present value) no bit of the model does.

    add     f' = f + amount         clamp   f' = amount
    scale   f' = f * amount         ablate  f' = 0

A normalised SAE's difference is in the units of its x: times the token's own standard deviation or
norm. A transcoder's is added at its output site.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saezoo.attaching import check_tensor, find_places
from saezoo.config import Site
from saezoo.errors import CaptureError, InputError
from saezoo.guard import Guard, check_host
from saezoo.hooks import See, Watch
from saezoo.sae import SAE
from saezoo.sites import Place
from saezoo.sparse import SparseFeatures
from saezoo.stats import feature_stats

How = Literal["add", "clamp", "scale", "ablate"]
Unit = Literal["max_activation", "raw"]

CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda _now, amount: amount,
    "clamp": lambda now, amount: amount - now,
    "scale": lambda now, amount: now * amount - now,
    "ablate": lambda now, _amount: -now,
}
"""f' - f, of f (…, n) and amounts."""


@contextmanager
def steer(
    model: nn.Module,
    sae: SAE,
    features: Mapping[int, float | Tensor] | Iterable[int],
    how: How = "add",
    unit: Unit = "max_activation",
    positions: slice | Sequence[int] | None = None,
    *,
    site: Site | None = None,
    out_site: Site | None = None,
    guard: Guard = "error",
    tokenizer: Any = None,
) -> Iterator[None]:
    """Change features of an SAE in a HuggingFace or TransformerLens model, at the SAE's own site.

    features: {feature: amount}; to ablate, the features alone will do. An amount is a number, or a
    tensor that broadcasts to (batch, positions) of each forward pass. unit, for add and clamp:
    "max_activation" counts in the largest activation that stats.safetensors knows of the feature,
    "raw" in the feature's own units. positions: of the sequence, from 0, those in a cache counted;
    None: all but those at the start that the SAE's token rule leaves out. site, out_site: instead
    of the spec's. guard, tokenizer: see `saezoo.guard.check_host`.

    Raises InputError for features or positions that do not exist, MissingFile where there are no
    stats, and CaptureError as `attach` does.
    """
    amounts = _amounts(sae, features, how, unit)
    place, out_place = find_places(model, sae, site, out_site, writes=True)
    check_host(model, sae.cfg, guard=guard, site=site, tokenizer=tokenizer)
    watch = Watch()
    part = _Steered(sae, amounts, how, _wanted(positions, sae), place, out_place, watch)
    with watch.hooked(model, part.pairs(), adds=True):
        yield


class _Steered:
    """The change that one SAE makes."""

    def __init__(
        self,
        sae: SAE,
        amounts: dict[int, float | Tensor],
        how: How,
        positions: slice | Tensor,
        place: Place,
        out_place: Place | None,
        watch: Watch,
    ) -> None:
        self.sae, self.how, self.positions, self.watch = sae, how, positions, watch
        self.place, self.out_place = place, out_place
        self.features = torch.tensor(list(amounts), device=sae.device)
        self.amounts = list(amounts.values())
        self._change: Tensor | None = None

    def pairs(self) -> list[tuple[Place, See]]:
        """What is to be hooked."""
        if self.out_place is None:
            return [(self.place, self._see)]
        return [(self.place, self._see_input), (self.out_place, self._see_output)]

    def _see(self, x: Tensor) -> Tensor | None:
        """What is to be added for x (batch, positions, d_in)."""
        check_tensor(x, self.sae.d_in, self.place)
        here = self._here(x.shape[-2], x.device)
        if not bool(here.any()):
            return None
        now = self._now(x)
        now = now.to(torch.promote_types(now.dtype, torch.float32))
        amounts = [torch.as_tensor(a, dtype=now.dtype, device=now.device) for a in self.amounts]
        try:
            amount = torch.stack([a.broadcast_to(now.shape[:-1]) for a in amounts], -1)
        except RuntimeError:
            shapes = [tuple(a.shape) for a in amounts]
            raise InputError(
                f"amounts of shapes {shapes} do not fit this forward pass, {tuple(x.shape[:-1])}"
            ) from None
        change = CHANGES[self.how](now, amount) * here.unsqueeze(-1)
        if not bool(change.any()):
            return None
        return self.sae.decode_change(self.features, change, x)

    def _see_input(self, x: Tensor) -> None:
        self._change = self._see(x)

    def _see_output(self, target: Tensor) -> Tensor | None:
        change, self._change = self._change, None
        if change is not None and change.shape != target.shape:
            assert self.out_place is not None
            raise CaptureError(
                f"{self.out_place.name} is {tuple(target.shape)}, but the SAE writes "
                f"{tuple(change.shape)}: is this its output site?"
            )
        return change

    def _now(self, x: Tensor) -> Tensor:
        """What the chosen features are at (…, n); not needed to add."""
        if self.how == "add":
            return x.new_zeros((*x.shape[:-1], len(self.features)), dtype=self.sae.b_dec.dtype)
        found = self.sae.encode_sparse(x) if self.sae.cfg.k else self.sae.encode(x)
        if isinstance(found, SparseFeatures):
            # at most one slot of a token holds a feature; unused slots hold the value 0
            on = found.indices.unsqueeze(-1) == self.features
            return (found.values.unsqueeze(-1) * on).sum(-2)
        return found[..., self.features]

    def _here(self, length: int, device: torch.device) -> Tensor:
        """Which positions of this pass (positions,) are to be changed."""
        places = torch.arange(self.watch.offset, self.watch.offset + length, device=device)
        if isinstance(self.positions, Tensor):
            return torch.isin(places, self.positions.to(device))
        start, stop, step = self.positions.start, self.positions.stop, self.positions.step
        here = (places >= (start or 0)) & ((places - (start or 0)) % (step or 1) == 0)
        return here if stop is None else here & (places < stop)


def _amounts(
    sae: SAE, features: Mapping[int, float | Tensor] | Iterable[int], how: str, unit: str
) -> dict[int, float | Tensor]:
    """Amounts in the features' own units."""
    if how not in CHANGES:
        raise InputError(f"how {how!r}: there are {', '.join(CHANGES)}")
    if unit not in ("max_activation", "raw"):
        raise InputError(f"unit {unit!r}: there are 'max_activation' and 'raw'")
    if isinstance(features, Mapping):
        amounts = dict(features)
    elif how == "ablate":
        amounts = dict.fromkeys(features, 0.0)
    else:
        raise InputError(f"how={how!r} needs amounts: {{feature: amount}}")
    if not amounts:
        raise InputError("no feature is given")
    for feature, amount in amounts.items():
        if not isinstance(amount, int | float | Tensor) or _has_nan(amount):
            raise InputError(f"the amount of feature {feature} is {amount!r}, not a number")
        if isinstance(feature, bool) or not isinstance(feature, int):
            raise InputError(f"feature {feature!r} is not a whole number")
        if not 0 <= feature < sae.d_sae:
            raise InputError(
                f"no feature {feature}: the SAE has {sae.d_sae:,}, 0 to {sae.d_sae - 1}"
            )
    if unit == "raw" or how in ("scale", "ablate"):
        return amounts
    largest = feature_stats(sae).get("max_activation")
    if largest is None:
        raise InputError("the SAE's stats have no max_activation: give unit='raw'")
    for feature in amounts:
        if not float(largest[feature]) > 0:
            raise InputError(
                f"feature {feature} was never on when the stats were made, so it has no largest "
                "activation: give unit='raw'"
            )
    return {feature: amount * float(largest[feature]) for feature, amount in amounts.items()}


def _has_nan(amount: float | Tensor) -> bool:
    return bool(torch.as_tensor(amount).isnan().any())


def _wanted(positions: slice | Sequence[int] | None, sae: SAE) -> slice | Tensor:
    """Positions of the sequence, as given or as the token rule has them."""
    if positions is None:
        return slice((sae.cfg.tokens.skip_first or 0) if sae.cfg.tokens else 0, None)
    parts = (
        [positions.start, positions.stop, positions.step]
        if isinstance(positions, slice)
        else list(positions)
    )
    if any(part is not None and part < 0 for part in parts):
        raise InputError(f"positions {positions!r}: they are counted from 0, the first token")
    return positions if isinstance(positions, slice) else torch.tensor(parts, dtype=torch.int64)


@torch.no_grad()
def continuation(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    *,
    bos: bool | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """What a HuggingFace model writes after a prompt, at most `tokens` tokens. temperature 0: the
    likeliest token each time. bos: whether BOS begins it; None: as the tokeniser has it.
    """
    if bos is None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        start = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
        ids = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("the prompt is empty")
    given = torch.tensor([ids], device=next(model.parameters()).device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        # the model's own settings would otherwise cut the distribution
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **sampling,
        )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
