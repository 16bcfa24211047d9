"""The formats that saezoo reads, as one literal table: how the files of each publisher look."""

import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How the files of one publisher look."""

    title: str
    files: tuple[str, ...] = ()
    """File names that a folder of this format must have."""
    one_of: tuple[str, ...] = ()
    """A folder must have one of these too; the first that it has is the one that is read. Of a
    pattern, such as `layer_*.safetensors`, it must have one alone.
    """
    optional: tuple[str, ...] = ()
    """File names that are fetched too where they exist; {stem} is the name of the one file without
    its ending.
    """
    suffixes: tuple[str, ...] = ()
    """Where one SAE is one file: how its name may end; `*` stands for anything."""
    marker: tuple[str, str] | None = None
    """(file, JSON key): tells apart formats whose file names are alike; {stem} as in `optional`."""
    holds: tuple[str, ...] = ()
    """Tensors that the weights must have: tells apart formats whose file names are alike. `*`
    stands for anything.
    """
    parts: bool = False
    """Whether one file may hold several SAEs: FILE/NAME is one of them."""
    writable: bool = False
    layer_files: tuple[str, ...] = ()
    """Where several layers belong together: the files of each, with {layer} for its number."""
    layered: bool = False
    """Whether one layer can be had by name: `FOLDER/layer_3`."""

    def one_of_in(self, names: Collection[str]) -> list[str]:
        """Those of these file names that `one_of` asks for, the first choice first."""
        return [
            name
            for wanted in self.one_of
            for name in fnmatch.filter(sorted(names), wanted)
            if name.count("/") == wanted.count("/")
        ]

    def is_called(self, name: str) -> str:
        """The longest of `suffixes` that a file name ends like; empty: none."""
        fitting = [end for end in self.suffixes if fnmatch.fnmatchcase(name, f"*{end}")]
        return max(fitting, key=len, default="")

    def layer_files_in(self, names: Collection[str], layer: int | None = None) -> list[str]:
        """Those of these names that are files of a layer, or of the one layer."""
        found = []
        for template in self.layer_files:
            start, _, end = template.partition("{layer}")
            pattern = re.compile(rf"{re.escape(start)}(\d+){re.escape(end)}")
            numbered = [
                (int(match[1]), match[0]) for match in map(pattern.fullmatch, names) if match
            ]
            found += [name for number, name in sorted(numbered) if layer in (None, number)]
        return found

    def shared_files(self) -> tuple[str, ...]:
        """The required files that belong to no one layer."""
        return tuple(name for name in self.files if not self.layer_files_in([name]))

    def optional_of(self, one_file: str) -> tuple[str, ...]:
        """The optional files of a folder (""), or those beside one file."""
        stem = one_file.rpartition(".")[0]
        return tuple(name.replace("{stem}", stem) for name in self.optional)


FORMATS: dict[str, Format] = {
    "native": Format(
        "saezoo's own folder",
        files=("config.json", "sae.safetensors"),
        optional=("golden.safetensors", "stats.safetensors", "README.md"),
        marker=("config.json", "saezoo_format"),
        writable=True,
        layer_files=("layer_{layer}.safetensors",),
        layered=True,
    ),
    "openai": Format("OpenAI sparse_autoencoder (gpt2-small)", suffixes=(".pt",)),
    "sparsify": Format("EleutherAI sparsify", files=("cfg.json", "sae.safetensors"), writable=True),
    "dictionary_learning": Format(
        "saprmarks dictionary_learning",
        files=("ae.pt",),
        optional=("config.json",),
        suffixes=("ae.pt",),
        writable=True,
    ),
    "saelens": Format("SAELens", files=("cfg.json", "sae_weights.safetensors"), writable=True),
    "gemma_scope": Format(
        "Google DeepMind Gemma Scope (Gemma 2)",
        files=("params.npz",),
        suffixes=("params.npz",),
        writable=True,
    ),
    "gemma_scope_2": Format(
        "Google DeepMind Gemma Scope 2 (Gemma 3)",
        files=("params.safetensors",),
        optional=("config.json",),
        suffixes=("params.safetensors",),
    ),
    "llama_scope": Format(
        "OpenMOSS Llama Scope (Llama 3.1 8B)",
        files=("hyperparams.json",),
        one_of=(
            "sae_weights.safetensors",
            "sae_weights.pt",
            "checkpoints/pruned.safetensors",
            "checkpoints/pruned.pt",
            "checkpoints/final.safetensors",
            "checkpoints/final.pt",
        ),
        optional=("lm_config.json",),
    ),
    "llama_scope_r1": Format(
        "OpenMOSS Llama Scope R1 Distill",
        files=("config.json",),
        one_of=("sae_weights.safetensors", "sae_weights.pt"),
        holds=("encoder.weight",),
    ),
    "llamascopium": Format(
        "OpenMOSS Llamascopium (Llama Scope 2)",
        files=("config.json",),
        one_of=("sae_weights.safetensors", "sae_weights.pt", "sae_weights.dcp/.metadata"),
        layered=True,
    ),
    "goodfire": Format(
        "Goodfire",
        suffixes=(".pt", ".pth"),
        holds=("encoder_linear.weight", "decoder_linear.weight"),
    ),
    "deepseek_r1": Format(
        "qresearch",
        suffixes=(".pt", ".pth"),
        holds=("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    ),
    "evo2": Format(
        "Goodfire's tied BatchTopK SAE (Evo 2)",
        suffixes=(".pt", ".pth"),
        holds=("W", "b_enc", "b_dec"),
    ),
    "qwen_scope": Format(
        "Qwen-Scope", suffixes=(".sae.pt",), optional=("config.json",), holds=("W_enc", "W_dec")
    ),
    "kissane_attn": Format(
        "Connor Kissane's attention SAEs",
        suffixes=(".pt",),
        optional=("{stem}_cfg.json",),
        marker=("{stem}_cfg.json", "act_size"),
        holds=("W_enc", "b_enc", "W_dec", "b_dec"),
    ),
    "mlsae": Format(
        "Tim Lawson's multi-layer SAE",
        files=("config.json", "model.safetensors"),
        marker=("config.json", "n_latents"),
    ),
    "interplm": Format("InterPLM", suffixes=("ae_normalized.pt", "ae_unnormalized.pt")),
    "esmc": Format(
        "Biohub ESM-C",
        suffixes=(".safetensors",),
        optional=("config.json",),
        holds=("W_enc", "W_dec", "b_dec", "idf", "max"),
    ),
    "circuit_tracer": Format(
        "circuit-tracer's transcoders of one layer",
        files=("config.yaml",),
        one_of=("layer_*.safetensors",),
        optional=("config.yaml", "wandb-config.yaml", "wanb-config.yaml"),
        suffixes=("layer_*.safetensors",),
        holds=("W_enc", "W_dec", "b_dec"),
        writable=True,
    ),
    "e2e": Format(
        "Apollo Research e2e_sae",
        suffixes=(".pt",),
        optional=("final_config.yaml",),
        holds=("*.encoder.0.weight", "*.decoder.weight"),
        parts=True,
    ),
    "dunefsky": Format(
        "Jacob Dunefsky's transcoders",
        suffixes=(".pt",),
        holds=("cfg", "state_dict", "hook_point", "W_dec", "b_dec"),
    ),
    "prisma": Format(
        "Prisma (vision models)",
        files=("config.json",),
        one_of=("weights.pt", "n_images_*.pt"),
        optional=("config.json",),
        suffixes=(".pt",),
        marker=("config.json", "activation_fn_str"),
        holds=("W_enc", "W_dec", "b_dec"),
    ),
    "gemma_scope_2_multi": Format(
        "Google DeepMind Gemma Scope 2, cross-layer transcoders and crosscoders",
        files=("params_layer_0.safetensors",),
        optional=("config.json",),
        layer_files=("params_layer_{layer}.safetensors",),
        layered=True,
    ),
    "mntss_clt": Format(
        "circuit-tracer's cross-layer transcoders",
        files=("config.yaml", "W_enc_0.safetensors", "W_dec_0.safetensors"),
        layer_files=("W_enc_{layer}.safetensors", "W_dec_{layer}.safetensors"),
        layered=True,
    ),
    "finetuning_crosscoder": Format(
        "science-of-finetuning's crosscoders",
        files=("config.json", "model.safetensors"),
        marker=("config.json", "dict_size"),
    ),
    "kissane_crosscoder": Format(
        "Connor Kissane's crosscoders", files=("cfg.json", "cc_weights.pt")
    ),
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "clt": ("mntss_clt", "gemma_scope_2_multi", "llamascopium"),
    "crosscoder": (
        "gemma_scope_2_multi",
        "finetuning_crosscoder",
        "kissane_crosscoder",
        "llamascopium",
    ),
}
"""Names that the registry uses for several formats: the files decide for which."""

REFUSED = {
    "temporal": "its codes come out of attention over the whole context, so they are not those of "
    "one token, which is all that an SAE here is given",
}
"""Formats of which the arithmetic has no exact form here, and why."""
