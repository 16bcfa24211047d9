"""Run a model again from a layer on, with the hidden state that a full pass left there.

The model's own forward still runs, so masks, rotary tables and the head are its own; only the
layers below are not computed: each gives at once what the last of them gave in the full pass.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saezoo.sites import FAMILIES, Place, run_model

PROBE = 16
"""Tokens of the pass that proves a model can be resumed."""


class Resume:
    """The layers below one place of one model. `start` is 0 where the model must run as a whole."""

    def __init__(self, model: nn.Module, place: Place) -> None:
        self.layers, self.start = _layers_below(model, place)

    @contextmanager
    def recorded(self) -> Iterator[list[Any]]:
        """Keeps what the layers below give in the full passes inside the `with`: one entry a pass,
        None where there are none below.
        """
        states: list[Any] = []
        if not self.start:
            states.append(None)
            yield states
            return
        last = self.layers[self.start - 1]
        handle = last.register_forward_hook(lambda _module, _args, out: states.append(out))
        try:
            yield states
        finally:
            handle.remove()

    @contextmanager
    def resumed(self, state: Any) -> Iterator[None]:
        """Passes inside the `with` do not compute the layers below; state=None: they do."""
        with ExitStack() as stack:
            for layer in self.layers[: self.start] if state is not None else ():
                stack.enter_context(_answers(layer, state))
            yield

    def prove(self, model: nn.Module, input_ids: Tensor, mask: Tensor) -> None:
        """Give up resuming, unless a resumed pass gives the full pass's logits bit for bit."""
        if not self.start:
            return
        ids, mask = input_ids[:1, :PROBE], mask[:1, :PROBE]
        with self.recorded() as states:
            full = run_model(model, ids, mask)
        with self.resumed(states[0]):
            again = run_model(model, ids, mask)
        if not torch.equal(full, again):
            self.layers, self.start = [], 0


def state_bytes(state: Any) -> int:
    """Memory that a recorded state takes."""
    values = state if isinstance(state, tuple) else (state,)
    return sum(item.numel() * item.element_size() for item in values if isinstance(item, Tensor))


@contextmanager
def _answers(layer: nn.Module, state: Any) -> Iterator[None]:
    """While open, the layer's forward returns `state`."""
    own = layer.__dict__.get("forward")
    layer.forward = lambda *_args, **_kwargs: state
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _layers_below(model: nn.Module, place: Place) -> tuple[list[nn.Module], int]:
    """The stack that holds a place, and how many of its layers are below. Only of architectures
    whose layers hand on nothing but the hidden state.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        return [], 0
    stacks = (item for item in model.modules() if isinstance(item, nn.ModuleList))
    for stack in stacks:
        for number, layer in enumerate(stack):
            if any(module is place.module for module in layer.modules()):
                after = layer is place.module and place.side == "output"
                return list(stack), number + after
    return [], 0
