"""A language model of a few thousand weights with its tokenizer, as a folder that transformers
opens, and text for it.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = 60
D = 12


def write_host(folder: Path) -> Path:
    """A two-layer Llama, 12 wide, whose tokens are the words w0 … w59 and two special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<pad>": 1} | {f"w{number}": number + 2 for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>"
    )
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, **heads)
    model = LlamaForCausalLM(config)
    save_file(
        {key: value.clone() for key, value in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def texts(documents: int, words: int = 40, seed: int = 0) -> list[str]:
    """Documents in which some words are likelier than others, and pairs go together."""
    draw = random.Random(seed)
    made = []
    for _ in range(documents):
        topic = draw.randrange(6)
        line = []
        while len(line) < words:
            first = draw.choice([topic * 10 + draw.randrange(10), draw.randrange(WORDS)])
            line += [f"w{first}", f"w{(first + 1) % WORDS}"]
        made.append(" ".join(line[:words]))
    return made


def write_texts(path: Path, documents: int, words: int = 40, seed: int = 0) -> Path:
    """The same as JSON lines."""
    lines = (json.dumps({"text": text}) + "\n" for text in texts(documents, words, seed))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def recipe(host: Path, dataset: Path | str, **changes: object) -> dict:
    """A recipe that takes a second; a change that is a dict is laid over what stands there."""
    made: dict = {
        "name": "tiny",
        "site": {"model": str(host), "layer": 0},
        "tokens": {"context": 32},
        "data": {"dataset": str(dataset), "batch_contexts": 4},
        "sae": {"d_sae": 48, "k": 4, "dead_after_tokens": 2000},
        "buffer": {"tokens": 512, "dtype": "float32"},
        "optimiser": {"lr": 3e-3, "warmup_steps": 5},
        "batch": 64,
        "train_tokens": 64 * 60,
        "run": {"log_every": 10, "device": "cpu"},
    }
    for key, value in changes.items():
        laid = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = made[key] | value if laid else value
    return made
