"""Entries of the registry load by name over the Hub: which files an SAE of each format needs, and
where the registry and the files say that it belongs.

The files are tiny, so sizes are taken out of a copy of the registry, and every k in it is that of
the origins.
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

from saezoo.errors import FormatError, MissingFile
from saezoo.files import registry_folder
from saezoo.load import load_sae
from saezoo.names import parse_name
from saezoo.numerics import close
from saezoo.registry import find_registered
from tests.origins import (
    circuit_tracer,
    dunefsky,
    esmc,
    evo2,
    goodfire,
    interplm,
    kissane_attn,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    mlsae,
    prisma,
    qwen_scope,
)
from tests.origins._origin import D, K

LLAMA = "meta-llama/Llama-3.1-8B"
LLAMA_5 = "model.layers.5.post_attention_layernorm"


def shrunk(value):
    """YAML without sizes, with the origins' k."""
    if isinstance(value, dict):
        return {
            key: K if key == "k" else shrunk(item)
            for key, item in value.items()
            if key not in ("d_in", "d_sae", "size", "sha256")
        }
    if isinstance(value, list):
        return [shrunk(item) for item in value]
    if isinstance(value, str):
        return value.replace("L0_50", f"L0_{K}").replace("k_64", f"k_{K}")
    return value


@pytest.fixture
def published(tmp_path, registry_at, hub):
    """Serves what an origin writes as the files of a registered SAE, and returns its tensors."""

    def publish(name, origin, write=None, make=None):
        release = name.partition("/")[0]
        text = (registry_folder() / f"{release}.yaml").read_text(encoding="utf-8")
        (tmp_path / "registry").mkdir()
        data = yaml.safe_dump(shrunk(yaml.safe_load(text)))
        (tmp_path / "registry" / f"{release}.yaml").write_text(data)
        registry_at(tmp_path / "registry")
        entry = find_registered(parse_name(name))
        tensors = (make or origin.tensors)(torch.Generator().manual_seed(0))
        path = (write or origin.write)(tmp_path / "files", tensors)
        folder, start = path, f"{entry.path}/" if entry.path else ""
        called, asked = "", ""
        if path.is_file():
            folder, start = path.parent, "".join(entry.path.rpartition("/")[:2])
            called, asked = path.stem, Path(entry.path).stem
        files = {
            start + item.relative_to(folder).as_posix().replace(called, asked): item.read_bytes()
            for item in folder.rglob("*")
            if item.is_file()
        }
        if path.is_file():
            files[entry.path] = path.read_bytes()
        files |= {"README.md": b"#", "other/large.bin": b"not asked for"}
        branch = entry.revision or "main"
        hub.commit(entry.source.removeprefix("hf://"), files, branch)
        return {
            key: value.double() if value.is_floating_point() else value
            for key, value in tensors.items()
        }

    return publish


def fetched(hub):
    """The names of the files whose bodies were asked for."""
    bodies = re.compile(r"(?:/storage)?/[^/]+/[^/]+(?:/resolve)?/[0-9a-f]{40}/(.+)")
    asked = [bodies.fullmatch(path) for method, path, _ in hub.requests if method == "GET"]
    return sorted({found[1] for found in asked if found})


ENTRIES = [
    # name, origin, files below the entry's path (or beside it), site: layer, point, module, hook
    (
        "goodfire-llama-3.3-70b-instruct/layer_50",
        goodfire.ORIGINS[0],
        ["Llama-3.3-70B-Instruct-SAE-l50.pt"],
        (50, "resid_post", "model.layers.50", "blocks.50.hook_resid_post"),
    ),
    (
        "goodfire-llama-3.1-8b-instruct/layer_19",
        goodfire.ORIGINS[1],
        ["Llama-3.1-8B-Instruct-SAE-l19.pth"],
        (19, "resid_post", "model.layers.19", "blocks.19.hook_resid_post"),
    ),
    (
        "deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post",
        goodfire.ORIGINS[3],
        ["DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"],
        (19, "resid_post", "model.layers.19", "blocks.19.hook_resid_post"),
    ),
    (
        "llama-3.2-1b-instruct-sae-l9/layer_9",
        goodfire.ORIGINS[0],  # the file decides between both namings
        ["Llama-3.2-1B-Instruct-SAE-l9.pt"],
        (9, None, None, None),
    ),
    (
        "deepseek-r1-sae-l37/math",
        evo2.ORIGINS[0],
        ["math/DeepSeek-R1-SAE-l37.pt"],
        (37, None, None, None),
    ),
    (
        "evo-2-layer-26-mixed/layer_26",
        evo2.ORIGINS[1],
        ["sae-layer26-mixed-expansion_8-k_3.pt"],
        (26, None, "blocks.26", None),
    ),
    (
        "qwen-scope-3-1.7b-base-w32k-l50/layer7",
        qwen_scope.ORIGINS[1],
        ["layer7.sae.pt"],
        (7, "resid_post", "model.layers.7", "blocks.7.hook_resid_post"),
    ),
    (
        "qwen-scope-3-1.7b-base-w32k-l50/layer7",
        qwen_scope.ORIGINS[0],
        ["config.json", "layer7.sae.pt"],
        (7, "resid_post", "model.layers.7", "blocks.7.hook_resid_post"),
    ),
    (
        "gpt2-small-hook-z-kk/blocks.5.hook_z",
        kissane_attn.ORIGINS[0],
        None,
        (5, "attn_z", "transformer.h.5.attn.c_proj", "blocks.5.attn.hook_z"),
    ),
    (
        "mlsae-pythia-70m-deduped/x64-k32",
        mlsae.ORIGINS[0],
        ["config.json", "model.safetensors"],
        (None, None, None, None),
    ),
    (
        "interplm-esm2-8m/layer_3/normalized",
        interplm.ORIGINS[0],
        ["layer_3/ae_normalized.pt"],
        (None, None, None, None),
    ),
    (
        "interplm-esm2-8m/layer_3/unnormalized",
        interplm.ORIGINS[1],
        ["layer_3/ae_unnormalized.pt"],
        (None, None, None, None),
    ),
    (
        "esmc-600m-sae-k64-codebook16384/layer_27",
        esmc.ORIGINS[0],
        ["config.json", "layer_27.safetensors"],
        (None, None, None, None),
    ),
    (
        "llama-scope-2-qwen3-1.7b/transcoder/8x/k64/layer9_transcoder_8x_k64",
        llamascopium.ORIGINS[7],
        [
            "transcoder/8x/k64/layer9_transcoder_8x_k64/config.json",
            "transcoder/8x/k64/layer9_transcoder_8x_k64/sae_weights.safetensors",
        ],
        (9, "mlp_in", None, "blocks.9.ln2.hook_normalized"),
    ),
    (
        "mntss-transcoder-llama-3.2-1b/layer_5",
        circuit_tracer.ORIGINS[3],
        ["config.yaml", "layer_5.safetensors"],
        (5, "resid_mid", LLAMA_5, "blocks.5.hook_resid_mid"),
    ),
    (
        "mntss-skip-transcoder-llama-3.2-1b-131k-nobos/layer_5",
        circuit_tracer.ORIGINS[3],
        ["config.yaml", "layer_5.safetensors"],
        (5, "resid_mid", LLAMA_5, "blocks.5.hook_resid_mid"),
    ),
    (
        "crv-8b-instruct-transcoders/layer_5",
        circuit_tracer.ORIGINS[5],
        ["config.yaml", "layer_5.safetensors"],
        (5, "mlp_in", "model.layers.5.mlp", "blocks.5.mlp.hook_in"),
    ),
    (
        "mwhanna-qwen3-4b-transcoders/layer_5",
        circuit_tracer.ORIGINS[9],
        ["config.yaml", "layer_5.safetensors", "wandb-config.yaml"],
        (5, "mlp_in", "model.layers.5.mlp", "blocks.5.mlp.hook_in"),
    ),
    (
        "mwhanna-qwen3-14b-transcoders/layer_5",
        circuit_tracer.ORIGINS[10],
        ["layer_5.safetensors", "wanb-config.yaml"],
        (5, "mlp_in", "model.layers.5.mlp", "blocks.5.mlp.hook_in"),
    ),
    (
        "gpt2-transcoders/layer_8",
        dunefsky.ORIGINS[0],
        ["final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_24576.pt"],
        (8, "mlp_in", None, "blocks.8.ln2.hook_normalized"),
    ),
    (
        "prisma-clip-b-32/vanilla-x64/layer_9_resid_post",
        prisma.ORIGINS[0],
        ["config.json", "weights.pt"],
        (9, "resid_post", None, "blocks.9.hook_resid_post"),
    ),
    (
        "prisma-clip-b-32/vanilla-x64/layer_9_mlp_out",
        prisma.ORIGINS[4],
        ["config.json", "n_images_2600058.pt"],
        (9, "mlp_out", None, "blocks.9.hook_mlp_out"),
    ),
    (
        "prisma-clip-b-32/top-k-64-cls/layer_9_resid_post",
        prisma.ORIGINS[3],
        ["config.json", "weights.pt"],
        (9, "resid_post", None, "blocks.9.hook_resid_post"),
    ),
]


@pytest.mark.parametrize(("name", "origin", "files", "site"), ENTRIES, ids=str)
def test_an_entry_loads_by_name_and_computes_what_its_origin_computes(
    name, origin, files, site, published, hub
):
    tensors = published(name, origin)
    sae = load_sae(name, dtype=torch.float64)
    x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert close(sae.encode(x), origin.encode(tensors, x))
    assert close(sae(x), origin.forward(tensors, x))
    if files is not None:
        assert fetched(hub) == files
    found = sae.cfg.site
    assert found.model
    assert (found.layer, found.point, found.module, found.hook_name) == site


def test_the_config_beside_one_file_is_fetched_with_it(published, hub):
    published("gpt2-small-hook-z-kk/blocks.5.hook_z", kissane_attn.ORIGINS[0])
    sae = load_sae("gpt2-small-hook-z-kk/blocks.5.hook_z")
    assert [name.rpartition("_nr4_v9")[2] for name in fetched(hub)] == [".pt", "_cfg.json"]
    assert sae.cfg.site.side == "input"


def factor_of(name):
    return find_registered(parse_name(name)).norm_scaling_factor


def test_llama_scope_is_fetched_from_its_subfolder(published, hub):
    name = "llama_scope_lxr_8x/l15r_8x"
    norm = D**0.5 / factor_of(name)
    write = llama_scope.writer(dataset_average_activation_norm={"in": norm, "out": norm})
    tensors = published(name, llama_scope.ORIGINS[0], write)
    sae = load_sae(name, dtype=torch.float64)
    folder = find_registered(parse_name(name)).path
    assert fetched(hub) == [
        f"{folder}/checkpoints/final.safetensors",
        f"{folder}/hyperparams.json",
    ]
    cfg = llama_scope.CONFIG | {"dataset_average_activation_norm": {"in": norm, "out": norm}}
    x = torch.randn(20, D, dtype=torch.float64)
    assert close(sae.encode(x), llama_scope.encode(tensors, x, cfg))
    assert close(sae(x), llama_scope.forward(tensors, x, cfg))
    site = sae.cfg.site
    assert (site.model, site.layer, site.point, site.module) == (
        LLAMA,
        15,
        "resid_post",
        "model.layers.15",
    )


def test_another_factor_in_the_file_than_in_the_registry_is_refused(published):
    name = "llama_scope_lxr_8x/l15r_8x"
    published(name, llama_scope.ORIGINS[0])
    with pytest.raises(FormatError, match="registry states norm_scaling_factor"):
        load_sae(name)


@pytest.mark.parametrize("both", [False, True], ids=["registry", "registry and file"])
def test_the_factor_of_r1_is_the_registrys_or_the_files_or_both(both, published):
    name = "llama_scope_r1_distill/l15r_800m_slimpajama"
    norm = D**0.5 / factor_of(name)
    make = llama_scope_r1.tensors(norm=norm if both else None)
    tensors = published(name, llama_scope_r1.ORIGINS[0], make=make)
    tensors[llama_scope_r1.NORM + llama_scope_r1.HOOK] = torch.tensor(norm, dtype=torch.float64)
    sae = load_sae(name, dtype=torch.float64)
    x = torch.randn(20, D, dtype=torch.float64)
    tolerance = torch.float32 if both else torch.float64  # the file's norm is a float32
    assert close(sae(x), llama_scope_r1.forward(tensors, x, llama_scope_r1.CONFIG), tolerance)
    assert sae.cfg.site.model == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert sae.cfg.site.module == "model.layers.15"


def test_two_factors_of_r1_must_agree(published):
    name = "llama_scope_r1_distill/l15r_800m_slimpajama"
    published(name, llama_scope_r1.ORIGINS[0], make=llama_scope_r1.tensors(norm=1.0))
    with pytest.raises(FormatError, match="registry states norm_scaling_factor"):
        load_sae(name)


def test_a_lorsa_of_llama_scope_2_is_refused_by_name(published):
    name = "llama-scope-2-qwen3-1.7b/lorsa/8x/k64/layer9_lorsa_8x_k64"
    published(name, llamascopium.ORIGINS[0], llamascopium.writer(sae_type="lorsa"))
    with pytest.raises(FormatError, match="sae_type 'lorsa' cannot be read here: sparse attention"):
        load_sae(name)


def test_of_a_distributed_checkpoint_only_its_name_is_fetched(published, hub):
    name = "llama-scope-2-qwen3-1.7b/transcoder/8x/k64/layer9_transcoder_8x_k64"

    def write(root, tensors):
        folder = llamascopium.writer()(root, tensors)
        (folder / "sae_weights.safetensors").unlink()
        (folder / "sae_weights.dcp").mkdir()
        for part in (".metadata", "__0_0.distcp"):
            (folder / "sae_weights.dcp" / part).write_bytes(b"x")
        return folder

    published(name, llamascopium.ORIGINS[0], write)
    with pytest.raises(FormatError, match=r"distributed checkpoint \(.dcp\).*save_pretrained"):
        load_sae(name)
    assert not any(file.endswith(".distcp") for file in fetched(hub))


def test_a_folder_without_any_of_the_weights_is_told_what_is_missing(published):
    name = "llama_scope_lxr_8x/l15r_8x"

    def write(root, tensors):
        folder = llama_scope.writer()(root, tensors)
        (folder / "checkpoints" / "final.safetensors").unlink()
        return folder

    published(name, llama_scope.ORIGINS[0], write)
    with pytest.raises(MissingFile, match="llama_scope needs"):
        load_sae(name)


def test_a_temporal_sae_is_refused_with_the_reason_before_any_request(hub):
    with pytest.raises(FormatError, match="temporal cannot be read: .*attention over the whole"):
        load_sae("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post")
    assert not hub.requests
