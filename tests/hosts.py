"""Tiny random language models of six architectures, made without a download."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

D, VOCABULARY, LAYERS = 12, 40, 3
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = SHAPE | {"num_key_value_heads": 1}
# heads wider than their share, as Gemma's and Qwen3's are
WIDE = GROUPED | {"head_dim": 8}
GPT2 = SPECIAL | {
    "vocab_size": VOCABULARY,
    "n_embd": D,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 64,
}

HOSTS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2, "transformer.h"),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, SHAPE, "gpt_neox.layers"),
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED, "model.layers"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, WIDE, "model.layers"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, WIDE, "model.layers"),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, WIDE, "model.layers"),
}
"""Name -> model, config, sizes, where its layers are."""


MORE = {
    "mistral": (MistralForCausalLM, MistralConfig, GROUPED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GROUPED),
    "gemma": (GemmaForCausalLM, GemmaConfig, WIDE),
}
"""Further architectures whose layers are as those of Llama."""


def make_host(name, seed=0):
    """One of HOSTS or MORE in eval mode, every weight random: no norm's gain is one, no bias
    zero.
    """
    model_class, config_class, sizes = (HOSTS | MORE)[name][:3]
    model = model_class(config_class(**sizes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.4)
    return model


def make_ids(rows=2, length=9, seed=1):
    """Token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
