"""Reading and replacing the tensors of places while a model runs; nothing stays behind.

A forward pass of the model is a call of its own forward, whether by `model(…)`, `generate`, or of
its base model. In each of them every hooked place must run: one that does not is an error.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saezoo.config import Site
from saezoo.errors import CaptureError
from saezoo.sites import Place, find_place, normalised

See = Callable[[Tensor], Tensor | None]
"""Gets the tensor (…, d) of a place; what it returns, if not None, goes on in its place."""


@contextmanager
def hook_site(model: nn.Module, site: Site, see: See) -> Iterator[None]:
    """Show each tensor that passes the site to `see`; what it returns (if not None) goes on in its
    place.

    Raises CaptureError if the site is not found, or never ran inside the `with`.
    """
    place, fired = find_place(model, site), 0

    def count(x: Tensor) -> Tensor | None:
        nonlocal fired
        fired += 1
        return see(x)

    handle = hook_place(place, count)
    try:
        yield
    finally:
        handle.remove()
    if not fired:
        raise CaptureError(
            f"{place.name} never ran in the forward pass, so nothing was captured or replaced"
        )


class Watch:
    """Places hooked in a model, and the forward passes that are under way."""

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        self.passes = 0
        """How many forward passes have ended."""
        self.offset = 0
        """How many tokens a cache holds already: the position of the first one of this pass."""
        self._ended = ended
        self._depth = 0
        self._fired: set[int] = set()
        self._names: list[str] = []

    @property
    def in_pass(self) -> bool:
        """Whether the model is in a forward pass: not so when a backward pass computes a layer
        again.
        """
        return self._depth > 0

    @contextmanager
    def hooked(
        self, model: nn.Module, pairs: Sequence[tuple[Place, See]], *, adds: bool = False
    ) -> Iterator[None]:
        """Hook all places, take them all away again. adds: as `hook_place` has it.

        Raises CaptureError, from the forward pass itself, for a place that did not run in it; and
        at the end if there was no forward pass.
        """
        self._names = [place.name for place, _ in pairs]
        with ExitStack() as stack:
            for number, (place, see) in enumerate(pairs):
                handle = hook_place(place, functools.partial(self._see, number, see), adds=adds)
                stack.callback(handle.remove)
            for root in _roots(model):
                stack.enter_context(self._around(root))
            yield
        if not self.passes:
            raise CaptureError(
                f"{type(model).__name__} was not run, so nothing was seen or replaced at "
                f"{', '.join(dict.fromkeys(self._names))}"
            )

    def _see(self, number: int, see: See, x: Tensor) -> Tensor | None:
        self._fired.add(number)
        return see(x)

    @contextmanager
    def _around(self, root: nn.Module) -> Iterator[None]:
        """While open, calls of root.forward are forward passes."""
        own, forward = root.__dict__.get("forward"), root.forward

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                self._fired, self.offset = set(), 0
            self._depth += 1
            self.offset = max(self.offset, _cached_tokens(kwargs))
            try:
                out = forward(*args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth:
                self._check()
            return out

        root.forward = watched
        try:
            yield
        finally:
            if own is None:
                del root.forward
            else:
                root.forward = own

    def _check(self) -> None:
        silent = [name for number, name in enumerate(self._names) if number not in self._fired]
        if silent:
            raise CaptureError(
                f"{', '.join(dict.fromkeys(silent))} did not run in this forward pass, so nothing "
                "was seen or replaced there"
            )
        self.passes += 1
        self._ended()


def hook_place(place: Place, see: See, *, adds: bool = False) -> RemovableHandle:
    """Register `see` on a place, until the handle is removed. adds: what it returns is added to the
    tensor of the model, in float32 at least, instead of taking its place.
    """
    if place.kind == "normalised":

        def norm_ran(norm: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> Any:
            raw = _only_tensor(place, args or tuple(kwargs.values()))
            return _shown(place, see, normalised(norm, raw), out, adds)

        return place.module.register_forward_hook(norm_ran, with_kwargs=True)
    if place.side == "output":
        return place.module.register_forward_hook(
            lambda _module, _args, out: _swap(place, see, out, adds)
        )

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if args:
            new = _swap(place, see, args, adds)
            return None if new is None else (new, kwargs)
        new = _swap(place, see, kwargs.get("hidden_states"), adds)
        return None if new is None else (args, kwargs | {"hidden_states": new})

    return place.module.register_forward_pre_hook(before, with_kwargs=True)


def _roots(model: nn.Module) -> list[nn.Module]:
    """The modules whose call is a forward pass: the model, its base model, and the HuggingFace
    model that a TransformerBridge wraps.
    """
    inner = [getattr(model, name, None) for name in ("base_model", "original_model")]
    found = [model, *(root for root in inner if isinstance(root, nn.Module))]
    return list({id(root): root for root in found}.values())


def _cached_tokens(kwargs: dict[str, Any]) -> int:
    """How many tokens the cache of a forward pass holds: HuggingFace's, and TransformerLens'."""
    for name in ("past_key_values", "cache", "past_kv_cache"):
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        if hasattr(cache, "entries"):
            return int(cache.entries[0].past_keys.shape[1])
    return 0


def _swap(place: Place, see: See, value: object, adds: bool) -> object:
    """What a module gives or gets, its tensor replaced by what `see` makes of it; None for as it
    is.
    """
    raw = _only_tensor(place, value)
    if place.kind == "in place":
        # a copy is shown, since what is shown is kept, and saved for gradients
        shown = raw.clone()
        new = _shown(place, see, shown, shown, adds)
        if new is not None:
            raw.copy_(new)
        return None
    # TransformerLens keeps heads apart
    heads = raw.dim() == 4 and place.name.endswith("hook_z")
    flat = raw.flatten(-2) if heads else raw
    new = _shown(place, see, flat, flat, adds)
    if new is None:
        return None
    new = new.reshape(raw.shape)
    return (new, *value[1:]) if isinstance(value, tuple) else new


def _shown(place: Place, see: See, x: Tensor, out: Tensor, adds: bool) -> Tensor | None:
    """What takes the place of `out`, which is x or what a norm made of it, in its dtype."""
    mean = x.mean(-1, keepdim=True) if place.centred else None
    new = see(x if mean is None else x - mean)
    if new is None:
        return None
    if adds:
        new = new if place.gain is None else new * place.gain
        return (out.to(torch.promote_types(out.dtype, new.dtype)) + new).to(out.dtype)
    new = new if mean is None else new + mean
    return (new if place.gain is None else place.after_norm(new)).to(out.dtype)


def _only_tensor(place: Place, value: object) -> Tensor:
    tensor = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(tensor, Tensor):
        raise CaptureError(f"{place.name}: this is {type(tensor).__name__}, not a tensor")
    return tensor
