"""From a TransformerLens hook name, such as `blocks.8.hook_resid_pre`, to a Site: layer, point and,
for hosts whose module names are known, the HuggingFace module that gives the same tensor.

What the hooks are: transformer_lens/components/transformer_block.py. What the modules are:
transformers' modeling_gpt2.py, modeling_gpt_neox.py, modeling_llama.py and modeling_gemma2.py.
"""

import re
from typing import Any, Literal, NamedTuple

from saezoo.config import Point, Site

POINTS: dict[str, Point] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "ln1.hook_normalized": "attn_in",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "hook_mlp_in": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "ln2.hook_normalized": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
}
"""What follows `blocks.N.` -> the point."""

Side = Literal["input", "output"]
Places = dict[str, tuple[str, Side]]

LAYER: Places = {"hook_resid_pre": ("", "input"), "hook_resid_post": ("", "output")}
GPT2: Places = LAYER | {
    "hook_resid_mid": (".ln_2", "input"),
    "attn.hook_z": (".attn.c_proj", "input"),
    "hook_attn_out": (".attn", "output"),
    "mlp.hook_in": (".mlp", "input"),
    "mlp.hook_post": (".mlp.c_proj", "input"),
    "hook_mlp_out": (".mlp", "output"),
}
NEOX: Places = LAYER | {  # attention and MLP are parallel: there is no hook_resid_mid
    "attn.hook_z": (".attention.dense", "input"),
    "hook_attn_out": (".attention", "output"),
    "mlp.hook_in": (".mlp", "input"),
    "mlp.hook_post": (".mlp.dense_4h_to_h", "input"),
    "hook_mlp_out": (".mlp", "output"),
}
LLAMA: Places = LAYER | {
    "hook_resid_mid": (".post_attention_layernorm", "input"),
    "attn.hook_z": (".self_attn.o_proj", "input"),
    "hook_attn_out": (".self_attn", "output"),
    "mlp.hook_in": (".mlp", "input"),
    "mlp.hook_post": (".mlp.down_proj", "input"),
    "hook_mlp_out": (".mlp", "output"),
}
GEMMA2: Places = LLAMA | {  # hook_…_out is what is added to the residual stream: after the norm
    "hook_resid_mid": (".pre_feedforward_layernorm", "input"),
    "hook_attn_out": (".post_attention_layernorm", "output"),
    "hook_mlp_out": (".post_feedforward_layernorm", "output"),
}
"""Hook -> (submodule of the layer, side). Left out on purpose: hook_normalized, which is before the
norm's gain and which no module outputs, and hook_mlp_in, which TransformerLens puts before the norm
and others use for after it.
"""


class Host(NamedTuple):
    """Where a family of language models keeps its layers."""

    names: str
    """Pattern at the start of the model's name without its organisation."""
    stack: str
    places: Places
    embed: str | None


HOSTS = (
    Host(r"(distil)?gpt2(-(small|medium|large|xl))?$", "transformer.h", GPT2, "transformer.wte"),
    Host(r"pythia-|gpt-neox-", "gpt_neox.layers", NEOX, "gpt_neox.embed_in"),
    # of Gemma 3, only the sizes without images; Gemma scales its embeddings after the module
    Host(r"gemma-2-\d+b|gemma-3-(1b|270m)", "model.layers", GEMMA2, None),
    Host(r"gemma-(2b|7b)", "model.layers", LLAMA, None),
    Host(
        r"(?!.*(vision|-vl|audio|omni|-a\d))((meta-)?llama-?[23][\d.]*-|mistral-7b|smollm2?-"
        r"|qwen(1\.5|2|2\.5|3)-|deepseek-r1-distill-)",
        "model.layers",
        LLAMA,
        "model.embed_tokens",
    ),
)

MODELS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
}
ORGANISATIONS = {"gemma-": "google", "pythia-": "EleutherAI"}
"""TransformerLens' short names whose HuggingFace id is the same after the organisation."""


def canonical_model(name: str | None) -> str | None:
    """The HuggingFace id of a model as TransformerLens calls it; None where it is not known."""
    if name is None or "/" in name:
        return name
    for start, organisation in ORGANISATIONS.items():
        if name.startswith(start):
            return f"{organisation}/{name}"
    return MODELS.get(name)


def site_of_hook(hook_name: str, model: str | None = None) -> Site:
    """The Site of a TransformerLens hook in a model, by TransformerLens' or HuggingFace's name.

    A HuggingFace module path such as `model.layers.3` stands for that module's output. What is not
    certain of a hook or a host is None: hook_name alone is always kept.
    """
    facts: dict[str, Any] = {"model": canonical_model(model), "hook_name": hook_name}
    host = _host_of(model)
    if hook_name == "hook_embed":
        return Site(**facts, point="embed", module=host.embed if host else None)
    found = re.fullmatch(r"blocks\.(\d{1,6})\.(.+)", hook_name)
    if found is None:
        return _site_of_module(hook_name, facts)
    layer, hook = int(found[1]), found[2]
    facts |= {"layer": layer, "point": POINTS.get(hook)}
    if hook.endswith("hook_normalized"):
        facts["rms_gain"] = False
    if host is not None and hook in host.places:
        submodule, side = host.places[hook]
        facts |= {"module": f"{host.stack}.{layer}{submodule}", "side": side}
    return Site(**facts)


def module_and_side(path: str) -> tuple[str, Side]:
    """A HuggingFace module path that may end in `.input` or `.output`, as (module, side)."""
    if path.endswith(".input"):
        return path.removesuffix(".input"), "input"
    return path.removesuffix(".output"), "output"


def _site_of_module(path: str, facts: dict[str, Any]) -> Site:
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d{1,6})(\.[\w.]+)?", path)
    if found is None:
        return Site(**facts)
    module, side = module_and_side(path)
    facts |= {"layer": int(found[1]), "module": module, "side": side, "hook_name": None}
    if found[2] in (None, ".output"):
        facts |= {"point": "resid_post", "hook_name": f"blocks.{found[1]}.hook_resid_post"}
    return Site(**facts)


def _host_of(model: str | None) -> Host | None:
    name = (model or "").rpartition("/")[2].lower()
    return next((host for host in HOSTS if re.match(host.names, name)), None)
