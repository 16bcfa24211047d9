"""What the registry says of a published SAE, with {placeholders} for what its id varies in.

A row of the table of published SAEs goes in: release, id, repo, path, format, model, and where
known l0, variance_explained, neuronpedia and norm_scaling_factor.
"""

import re
import sys
from typing import Any

Facts = dict[str, Any]

FORMATS = (
    "saelens",
    "gemma_scope",
    "gemma_scope_2",
    "qwen_scope",
    "circuit_tracer",
    "llama_scope",
    "llama_scope_r1",
    "clt",
    "kissane_attn",
    "temporal",
    "goodfire",
    "deepseek_r1",
)

MODELS = {
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b",
    "gpt2-small": "openai-community/gpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
} | {f"qwen3-{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")}
"""Short names in the table -> HuggingFace ids."""

STACKS = {"gpt2": "transformer.h", "pythia": "gpt_neox.layers"}
"""Part of a model's name -> where its layers are, when it is not model.layers."""

MODULES = {
    "transformer.h": {
        "resid_mid": ".ln_2",
        "attn_z": ".attn.c_proj",
        "attn_out": ".attn",
        "mlp_out": ".mlp",
    },
    "gpt_neox.layers": {"attn_out": ".attention", "mlp_out": ".mlp"},
    "model.layers": {"attn_out": ".self_attn", "mlp_in": ".mlp", "mlp_out": ".mlp"},
}
"""What to add to a layer's path for a point; the residual stream before and after adds nothing."""

GEMMA_MODULES = {
    "attn_z": ".self_attn.o_proj",
    "mlp_in": ".pre_feedforward_layernorm",
    "mlp_out": ".post_feedforward_layernorm",
}
"""The same for Gemma 2 and 3, which have norms after attention and MLP too."""

INPUTS = ("resid_pre", "resid_mid", "attn_z")
"""Points that are the input of their module."""

POINTS = {
    "res": "resid_post",
    "resid_post": "resid_post",
    "att": "attn_z",
    "attn_out": "attn_z",  # of Gemma Scope 2: the heads' outputs before o_proj
    "mlp": "mlp_out",
    "mlp_out": "mlp_out",
    "transcoders": "mlp_in",
    "transcoder": "mlp_in",
}
"""Gemma Scope's words (end of the repo, or first folder) -> points."""

PLACES = {
    "embed": "the embeddings",
    "resid_pre": "the residual stream",
    "resid_mid": "the residual stream between attention and MLP",
    "resid_post": "the residual stream",
    "attn_z": "the attention heads' outputs",
    "attn_out": "the attention outputs",
    "mlp_in": "the MLPs",
    "mlp_out": "the MLP outputs",
}

WIDTHS = {f"{n}k": n * 1024 for n in (4, 16, 32)} | {
    "65k": 65536,
    "128k": 131072,
    "131k": 131072,
    "262k": 262144,
    "524k": 524288,
    "1m": 1048576,
}

LLAMA_SCOPE_POINTS = {"R": "resid_post", "A": "attn_out", "M": "mlp_out"}
"""Llama Scope's letters (in the repo's name) -> points."""

MAKERS = {
    "saelens": "SAELens",
    "gemma_scope": "Gemma Scope",
    "gemma_scope_2": "Gemma Scope 2",
    "qwen_scope": "Qwen-Scope",
    "circuit_tracer": "circuit-tracer",
    "llama_scope": "Llama Scope",
    "llama_scope_r1": "Llama Scope R1",
    "clt": "circuit-tracer's cross-layer transcoders, each layer as a transcoder of its own",
    "kissane_attn": "Kissane's attention SAEs",
    "temporal": "temporal SAEs",
    "goodfire": "Goodfire",
    "deepseek_r1": "qresearch",
}

SHARED: dict[str, Facts] = {
    "gemma_scope": {"paper": "https://arxiv.org/abs/2408.05147", "licence": "CC-BY-4.0"},
    "qwen_scope": {
        "licence": "other (qwen)",
        "use_restriction": "the card prohibits use to interfere with model capabilities",
    },
    "llama_scope": {
        "paper": "https://arxiv.org/abs/2410.20526",
        "notes": {"moved": "fnlp is now OpenMOSS-Team; the Hub redirects the old name"},
    },
    "llama_scope_r1": {
        "licence": "Apache-2.0",
        "notes": {"moved": "fnlp is now OpenMOSS-Team; the Hub redirects the old name"},
    },
    "kissane_attn": {
        "paper": "https://www.lesswrong.com/posts/FSTRedtjuHa4Gfdbr/"
        "attention-saes-scale-to-gpt-2-small"
    },
}
"""Facts of all releases of a format that the table does not hold."""

KNOWN_BY_REPO = FORMATS[3:]
"""Formats whose releases may be called like their repo too."""

MORE: dict[str, Facts] = {
    "gpt2-small-res-jb": {
        "paper": "https://www.lesswrong.com/posts/f9EgfLSurAiqRJySD/"
        "open-source-sparse-autoencoders-for-all-residual-stream"
    },
    # sizes as in other people's code
    "goodfire-llama-3.1-8b-instruct": {"d_sae": 65536},
    "goodfire-llama-3.3-70b-instruct": {"d_sae": 65536},
    "deepseek-r1-distill-llama-8b-qresearch": {"d_sae": 65536},
    "mntss-gemma-2-2b-2.5m-clt-as-per-layer": {"d_sae": 98304},
    # the file does not say it, and without it the activations are of the wrong size
    "mistral-7b-res-wg": {"normalize_activations": "constant_norm_rescale"},
}
"""Facts of whole releases that the table does not hold."""

CENTRED = ("gpt2-small-res-jb", "gpt2-small-res-jb-feature-splitting", "gpt2-small-mlp-tm")
"""Trained on a host with centred writing weights."""

CORRECTIONS: dict[tuple[str, str], Facts] = {
    # pages of other SAEs
    ("gemma-scope-9b-pt-res", "layer_2/width_16k/average_l0_8"): {"neuronpedia": None},
    ("gemma-scope-9b-pt-res", "layer_20/width_131k/average_l0_114"): {"neuronpedia": None},
    ("pythia-70m-deduped-res-sm", "blocks.0.hook_resid_pre"): {
        "neuronpedia": "pythia-70m-deduped/e-res-sm"
    },
    # the table says 78, the folder average_l0_48
    ("gemma-scope-9b-pt-res-canonical", "layer_20/width_524k/canonical"): {"l0": 48},
}
"""What the table says wrongly."""

PLACES_OF = {
    "layer": r"(?<=\bblocks\.)#(?=\.)|(?<=layer_)#(?!\d)|(?<![\w.-])#(?=-(?!Slim))"
    r"|(?<=\blayer)#(?=$|\.sae)|(?<=\bl)#(?=[ram]_)|(?<=-L)#(?=[RAM]-)|(?<=/L)#(?=R$)",
    "l0": r"(?<=average_l0_)#$|(?<=__l0-)#$",
    "width": r"(?<=width_)#(?![a-z0-9])|(?<=-)#(?=$|__l0)",
    "d_sae": r"(?<=hook_resid_pre_)#$|(?<=res_fs)#(?=-)",
}
"""Where a placeholder's value # may stand in an id, a path or a Neuronpedia id."""

HUNG = ("l0", "variance_explained", "norm_scaling_factor")
"""Facts that hang on the layer."""

OWN_WIDTHS = {
    "qwen_scope": ("repo", r"-W(\d+)K-", 1024),
    "llama_scope": ("repo", r"-(\d+)x$", 4096),
    "llama_scope_r1": ("neuronpedia", r"-(\d+)k$", 1024),
    "kissane_attn": ("path", r"_ds(\d+)_", 1),
}
"""Format -> where a row says its number of features, how, and in what unit."""

GIVEN = ("l0", "variance_explained", "neuronpedia", "norm_scaling_factor")
"""Facts of a row that are taken as they are."""


def describe(row: Facts) -> tuple[Facts, Facts]:
    """A row's facts with {placeholders}, and the values of these; filled in, they are the row."""
    values = values_of(row)
    facts: Facts = {key: abstract(row[key], values) for key in ("id", "path")}
    if "width" in values or "d_sae" in values:
        facts["d_sae"] = "{d_sae}"
    elif width := width_of(row):
        facts["d_sae"] = width
    if row["format"] == "qwen_scope":  # TopK: its L0 is its k
        facts["k"] = row["l0"]
    for key in GIVEN:
        if key in row:
            facts[key] = abstract(row[key], values) if key == "neuronpedia" else f"{{{key}}}"
    return facts | sites_of(row), values


def values_of(row: Facts) -> Facts:
    """Placeholders that a row's id allows, and their values."""
    values: Facts = {}
    if found := re.search(r"(?:blocks\.|layer_?|^l)(\d+)", row["id"]):
        values["layer"] = int(found[1])
    values |= {key: row[key] for key in HUNG if key in row}
    if found := re.search(r"width_(\d+[km])(?![a-z0-9])", row["path"]):
        values["width"] = found[1]
    if found := re.fullmatch(r"blocks\.\d+\.hook_resid_pre_(\d+)", row["id"]):
        values["d_sae"] = int(found[1])
    if row["format"] == "gemma_scope_2":
        found = re.search(r"(_affine|_seed_1)?$", row["id"])
        values["variant"] = found[0] if found else ""
    return values


def abstract(text: str, values: Facts) -> str:
    """Put placeholders where the values stand; another number at the same place stays."""
    for key, value in values.items():
        if key in PLACES_OF:
            text = re.sub(PLACES_OF[key].replace("#", str(value)), f"{{{key}}}", text)
        elif key == "variant" and "_l0_" in text:  # an id or a path
            text = f"{text.removesuffix(value)}{{variant}}"
    return text


def width_of(row: Facts) -> int | None:
    """The number of features, where id, path or repo say it."""
    if found := re.search(r"width_(\d+[km])(?![a-z0-9])", row["path"]):
        return WIDTHS[found[1]]
    if found := re.search(r"hook_\w+?_(\d{3,6})(?=[_:]|$)", row["path"]):
        return int(found[1])
    if found := re.search(r"(?:^|[-_])(?:v5_|w-)(\d+k)(?=[-_])", f"{row['path']} {row['repo']}"):
        return WIDTHS[found[1]]
    if row["format"] in OWN_WIDTHS:
        where, pattern, unit = OWN_WIDTHS[row["format"]]
        if found := re.search(pattern, row.get(where, "")):
            return int(found[1]) * unit
    return None


def sites_of(row: Facts) -> dict[str, Facts]:
    """The site of a row, and a transcoder's out_site."""
    model = MODELS.get(row["model"]) or row["model"]
    if row["path"].startswith("embedding/"):
        # Gemma scales its embeddings: what hook_embed gives is what layer 0 reads
        site = {"point": "embed", "module": "model.layers.0", "side": "input"}
        return {"site": {"model": model} | site | {"hook_name": "hook_embed"}}
    if row["format"] == "saelens":
        found = re.match(r"blocks\.\d+\.hook_([a-z]+_[a-z]+)", row["id"])
        if not found:
            sys.exit(f"{row['release']}/{row['id']}: no hook in the id")
        site = make_site(model, found[1])
        return {"site": site | {"centred": True} if row["release"] in CENTRED else site}
    if row["format"] in KNOWN_BY_REPO:
        return sites_by_repo(row, model)
    if row["format"] == "gemma_scope":
        point = POINTS[row["repo"].rpartition("-")[2]]
    else:
        point = POINTS[row["path"].partition("/")[0].removesuffix("_all")]
    site = make_site(model, point)
    if point != "mlp_in":
        return {"site": site}
    site["rms_gain"] = row["format"] == "gemma_scope_2"
    if not site["rms_gain"]:
        # no module gives the normalised residual without the gain of the norm
        del site["module"]
        site["hook_name"] = "blocks.{layer}.ln2.hook_normalized"
    return {"site": site, "out_site": make_site(model, "mlp_out")}


def sites_by_repo(row: Facts, model: str) -> dict[str, Facts]:
    """The sites of the formats where the repo decides, or the format itself."""
    if row["format"] == "clt":
        # where it reads is in a file of the repo that nobody here has read
        return {"site": {"model": model, "layer": "{layer}"}}
    if row["format"] == "circuit_tracer":
        # of the norm's output, as the MLP gets it
        site = make_site(model, "mlp_in") | {"side": "input", "rms_gain": True}
        site["hook_name"] = "blocks.{layer}.mlp.hook_in"
        return {"site": site, "out_site": make_site(model, "mlp_out")}
    if row["format"] == "kissane_attn":
        return {"site": make_site(model, "attn_z")}
    letter = re.search(r"-LX([RAM])-", row["repo"])
    return {"site": make_site(model, LLAMA_SCOPE_POINTS[letter[1]] if letter else "resid_post")}


def make_site(model: str, point: str) -> Facts:
    """The site at a point of any layer."""
    stack = next((path for part, path in STACKS.items() if part in model), "model.layers")
    modules = GEMMA_MODULES if "gemma-" in model else MODULES[stack]
    site: Facts = {"model": model, "layer": "{layer}", "point": point}
    site["module"] = f"{stack}.{{layer}}{modules.get(point, '')}"
    if point in INPUTS:
        site["side"] = "input"
    if point != "mlp_in":  # TransformerLens has no hook after the gain of a norm
        hook = "attn.hook_z" if point == "attn_z" else f"hook_{point}"
        site["hook_name"] = f"blocks.{{layer}}.{hook}"
    return site


def shared_facts(release: str, rows: list[Facts]) -> Facts:
    """What holds for every SAE of a release."""
    (repo,) = {row["repo"] for row in rows}
    (made_by,) = {row["format"] for row in rows}
    shared: Facts = {"format": made_by, "source": f"hf://{repo}", "author": repo.partition("/")[0]}
    shared |= SHARED.get(made_by, {}) | MORE.get(release, {})
    described = [describe(row)[0] for row in rows]
    widths = {width_of(row) for row in rows}
    if len(widths) == 1 and (width := widths.pop()):
        shared["d_sae"] = width
    usual = [one for one in described if one["site"].get("point") != "embed"]
    if len({one.get("k") for one in described}) == 1 and "k" in described[0]:
        shared["k"] = described[0]["k"]
    for key in ("site", "out_site"):
        common = {
            name: value
            for name, value in usual[0].get(key, {}).items()
            if "{" not in str(value) and all(one[key].get(name) == value for one in usual)
        }
        if common:
            shared[key] = common
    return shared


def aliases(release: str, rows: list[Facts]) -> list[str]:
    """The repo's own name, where people know the release by it."""
    name = rows[0]["repo"].partition("/")[2]
    if rows[0]["format"] not in KNOWN_BY_REPO or name == release or "clt" in name:
        return []
    return [] if name == "temporalSAEs" else [name]


def about(rows: list[Facts], shared: Facts) -> str:
    """One sentence on a release."""
    points = {PLACES[describe(row)[0]["site"].get("point", "mlp_in")] for row in rows}
    places = " and ".join(sorted(points, key=lambda place: place != "the residual stream"))
    kind = "transcoders of" if "out_site" in shared or shared["format"] == "clt" else "SAEs on"
    if len(rows) == 1:
        kind = kind.replace("transcoders", "transcoder").replace("SAEs", "SAE")
    chosen = ", one for each layer and width" if rows[0]["id"].endswith("/canonical") else ""
    return (
        f"{len(rows)} {kind} {places} of {shared['site']['model']}, in the format of "
        f"{MAKERS[shared['format']]}{chosen}."
    )
