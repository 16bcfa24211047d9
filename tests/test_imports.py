"""Imports are cheap and go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saezoo
from saezoo import SAE, SAEConfig, save_sae

ROOT = Path(__file__).parent.parent

TIERS = [
    {"errors", "numerics", "places", "gpu", "sparse_gpu"},
    {"files"},
    {"names", "config"},
    {"config_multi"},
    {"entry", "sparse", "custom", "documents", "shards", "placing"},
    {"chunked", "inputs"},
    {"rows"},
    {"sae", "registry", "formats"},
    {"clt_layer", "crosscoder"},
    {"clt"},
    {"build"},
    {"save", "interop"},
    {"transfer"},
    {"hf", "https"},
    {"needed", "fetched", "pointers"},
    {"unlisted"},
    {"hub"},
    {"manifest", "index", "kept", "metadata", "fill"},
    {"stanza"},
    {"zoo"},
    {"find", "search", "many"},
    {"load"},
    {"sites"},
    {"hooks", "guard", "stats"},
    {"capture", "attaching"},
    {"steering", "cache_activations"},
    {"metrics", "resume", "host"},
    {"passes"},
    {"evaluation"},
    {"features", "suspects", "figure"},
    {"bench"},
    {"selfcheck"},
    {"convert", "check", "demo", "cached", "verify", "cite"},
    {"publishing"},
    {"cli"},
    {"__main__"},
]
"""A module may import from the tiers above its own, and from its own package."""

TRAINS = {"saezoo/cli/train.py", "saezoo/cli/plot_run.py"}
"""Commands of the trainer: they import it inside their functions, and nothing else ever does."""

EXCEPTIONS = {
    ("sae", "load"): "SAE.from_pretrained, which users of SAELens look for on the class",
}

HEAVY = [
    "torch",
    "numpy",
    "yaml",
    "pydantic",
    "huggingface_hub",
    "transformers",
    "datasets",
    "pooch",
    "rich",
]


def tier(module):
    for number, names in enumerate(TIERS):
        if module in names:
            return number
    raise AssertionError(f"saezoo/{module} stands in no tier of this test: say where it belongs")


def imports_of(path):
    """(module, line) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, [alias.name for alias in node.names], node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node.lineno


def at_import(path):
    """Lines of imports that run when a file is imported: those for type checkers do not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}


LIBRARY = sorted((ROOT / "saezoo").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT / "saezoo").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module, names, line in imports_of(path):
        parts = module.split(".")
        if parts[0] == "saezoo_train":
            where = path.relative_to(ROOT).as_posix()
            assert where in TRAINS, f"{path}:{line}: the library never imports the trainer"
            assert line not in at_import(path), f"{path}:{line}: import the trainer when it is used"
        if parts[0] != "saezoo":
            continue
        if parts == ["saezoo"]:
            assert set(names) <= {"__version__"}, f"{path}:{line}: import from the submodule"
            continue
        if parts[1] != own and (own, parts[1]) not in EXCEPTIONS:
            assert tier(parts[1]) < tier(own), f"{path}:{line}: {own} may not import {parts[1]}"


def test_every_exception_is_still_needed():
    found = {
        (path.stem, module.split(".")[1])
        for path in LIBRARY
        for module, _, _ in imports_of(path)
        if module.startswith("saezoo.")
    }
    assert set(EXCEPTIONS) <= found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training").rglob("*.py")), ids=lambda path: path.name
)
def test_the_trainer_imports_no_private_part_of_the_library(path):
    for module, _, line in imports_of(path):
        assert not (module.startswith("saezoo.") and "._" in module), f"{path}:{line}"


def modules_after(code):
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import saezoo",
        "from saezoo.cli import main\ntry:\n  main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["import saezoo", "saezoo --help"],
)
def test_import_and_help_are_light(code):
    assert not modules_after(code) & set(HEAVY)


def test_loading_the_bundled_sae_never_imports_transformers_or_a_downloader():
    loaded = modules_after(
        "import saezoo; saezoo.load_sae('smollm2-135m-instruct/layer_15_resid_post')"
    )
    assert {"torch", "safetensors", "pydantic", "yaml"} <= loaded
    assert not loaded & {
        "transformers",
        "transformer_lens",
        "datasets",
        "huggingface_hub",
        "pooch",
        "rich",
    }


def test_loading_a_local_folder_needs_neither_yaml_nor_a_downloader(tmp_path):
    save_sae(SAE(SAEConfig(architecture="relu", d_in=4, d_sae=8)), tmp_path / "tiny")
    loaded = modules_after(f"import saezoo; saezoo.load_sae({str(tmp_path / 'tiny')!r})")
    assert {"torch", "safetensors", "pydantic"} <= loaded
    assert not loaded & {"yaml", "transformers", "datasets", "huggingface_hub", "pooch", "rich"}


def test_every_public_name_is_there_and_documented():
    for name in saezoo.__all__:
        value = getattr(saezoo, name)
        assert name == "__version__" or value.__doc__, name
    assert set(saezoo.__all__) == set(dir(saezoo))
    with pytest.raises(AttributeError, match="nonsense"):
        saezoo.nonsense  # noqa: B018 the access is what is tested


def test_no_public_name_is_that_of_a_module_which_would_take_its_place():
    names = {path.stem for path in (ROOT / "saezoo").iterdir()}
    assert not names & set(saezoo.__all__)
