"""e2e_sae: the state dict of a ModuleDict of SAEs, and final_config.yaml; SAE.forward, which
normalises its decoder.
"""

import torch
import yaml

from tests.origins._origin import D, N, Origin, draw

HOOK = "blocks.6.hook_resid_pre"
OTHER = "blocks.10.hook_resid_pre"
CONFIG = {
    "tlens_model_name": "gpt2-small",
    "tlens_model_path": None,
    "seed": 0,
    "lr": 5e-4,
    "loss": {"sparsity": {"p_norm": 1.0, "coeff": 3.0}},
    "saes": {
        "type_of_sparsifier": "sae",
        "dict_size_to_input_ratio": float(N / D),
        "k": None,
        "sae_positions": [HOOK],
    },
}


def unit_power(g):
    """(D, N): columns of which the length is a power of two, far from 1, so that float32 and
    float64 divide by it alike: four entries of one size, the others 0.
    """
    size = 2.0 ** torch.randint(-2, 3, (N,), generator=g)
    signs = torch.randint(0, 2, (D, N), generator=g) * 2.0 - 1
    chosen = torch.rand(D, N, generator=g).argsort(dim=0) < 4
    return signs * chosen * size


def tensors(*hooks, columns=unit_power):
    def make(g):
        made = {}
        for hook in hooks or (HOOK,):
            start = hook.replace(".", "-")
            made |= {
                f"{start}.encoder.0.weight": draw(g, N, D),
                f"{start}.encoder.0.bias": draw(g, N),
                f"{start}.decoder.weight": columns(g),
                f"{start}.decoder.bias": draw(g, D),
            }
        return made

    return make


def writer(part="", *, config=True, **changes):
    def write(folder, t):
        folder = folder / "gpt2_e2e"
        folder.mkdir(parents=True)
        torch.save(t, folder / "samples_400000.pt")
        if config:
            text = yaml.safe_dump(CONFIG | changes)
            (folder / "final_config.yaml").write_text(text)
        return folder / "samples_400000.pt" / part

    return write


def encode(t, x, hook=HOOK):
    start = hook.replace(".", "-")
    return torch.relu(x @ t[f"{start}.encoder.0.weight"].T + t[f"{start}.encoder.0.bias"])


def forward(t, x, hook=HOOK):
    start = hook.replace(".", "-")
    elements = torch.nn.functional.normalize(t[f"{start}.decoder.weight"], dim=0)
    return encode(t, x, hook) @ elements.T + t[f"{start}.decoder.bias"]


def as_stored(t, x):
    start = HOOK.replace(".", "-")
    return encode(t, x) @ t[f"{start}.decoder.weight"].T + t[f"{start}.decoder.bias"]


def of_rows(t, x):
    """Each coordinate normalised over the features, the other way round."""
    start = HOOK.replace(".", "-")
    elements = torch.nn.functional.normalize(t[f"{start}.decoder.weight"], dim=1)
    return encode(t, x) @ elements.T + t[f"{start}.decoder.bias"]


def centred(t, x):
    return forward(t, x - t[f"{HOOK.replace('.', '-')}.decoder.bias"])


def origin(name, write, *hooks, of=HOOK, mistakes=()):
    return Origin(
        name,
        "e2e",
        write,
        tensors(*hooks),
        lambda t, x: encode(t, x, of),
        lambda t, x: forward(t, x, of),
        mistakes,
    )


ORIGINS = [
    origin("one SAE", writer(), mistakes=(as_stored, of_rows, centred)),
    origin("without a config", writer(config=False), mistakes=(as_stored,)),
    origin(
        "one of two SAEs",
        writer(OTHER),
        HOOK,
        OTHER,
        of=OTHER,
        mistakes=(forward,),
    ),
]
