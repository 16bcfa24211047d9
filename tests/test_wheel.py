"""A wheel works away from the checkout: registry, bundled weights, recipes, command."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, so that the build leaves nothing behind here."""
    copy = tmp_path_factory.mktemp("tree") / "saezoo"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "*.egg-info", "build", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=left_out)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"saezoo", "saezoo_train"}
    for needed in (
        "saezoo/_registry/openai-gpt2-small.yaml",
        "saezoo/bundled/smollm2-135m-instruct/layer_15_resid_post/sae.safetensors",
        "saezoo/texts/demo.txt",
        "saezoo/py.typed",
        "saezoo_train/recipes/smollm2-135m-instruct-layer-15.yaml",
    ):
        assert needed in names, needed


def test_the_bundled_sae_loads_by_name_from_the_installed_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import json, saezoo, torch\n"
        "sae = saezoo.load_sae('smollm2-135m-instruct/layer_15_resid_post')\n"
        'names = [entry.name for entry in saezoo.list_saes(release="openai-gpt2-small")]\n'
        "print(json.dumps([saezoo.__file__, sae(torch.zeros(2, sae.d_in)).shape, len(names)]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    where, shape, count = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(site)
    assert shape == [2, 576]
    assert count == 144
