"""Recipes: every field has a default, what is printed is a recipe, what is unknown is refused with
the nearest.
"""

import re
from pathlib import Path

import pytest
import yaml
from saezoo_train import read_recipe
from saezoo_train.architectures import ARCHITECTURES
from saezoo_train.config import resolve
from saezoo_train.reading import (
    bundled_recipes,
    differences,
    find_recipe,
    parse_change,
    to_yaml,
)

from saezoo.config import Site
from saezoo.errors import ConfigError
from saezoo.host import SMOLLM2

ROOT = Path(__file__).parent.parent


def refused(changes, source=None):
    """The one line with which a recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        read_recipe(source or {}, changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_empty_recipe_is_a_recipe_for_every_architecture(architecture):
    recipe = resolve(read_recipe({"architecture": architecture}))
    assert recipe.site.model == SMOLLM2
    assert recipe.optimiser.lr > 0
    assert recipe.steps > 0
    assert type(recipe.sae) is ARCHITECTURES[architecture].Options


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_every_bundled_recipe_is_valid_says_what_it_is_and_prints_as_itself(name):
    recipe = resolve(read_recipe(name))
    assert bundled_recipes()[name]
    assert recipe.site.model
    assert recipe.name != "my-sae"
    assert resolve(read_recipe(yaml.safe_load(to_yaml(recipe)))) == recipe


def test_the_recipes_of_the_issue_are_bundled():
    assert {
        "smollm2-135m-instruct-layer-15",
        "gpt2-small",
        "pythia-160m",
        "llama-3.2-1b",
        "gemma-2-2b",
    } <= bundled_recipes().keys()


def test_gpt2_small_has_the_settings_of_the_openai_paper():
    recipe = resolve(read_recipe("gpt2-small"))
    sae = recipe.sae
    assert (sae.d_sae, sae.k, sae.auxk, sae.auxk_coefficient) == (32768, 32, 256, 1 / 32)
    assert sae.dead_after_tokens == 10_000_000
    assert (recipe.batch, recipe.tokens.context) == (131_072, 64)
    assert (recipe.optimiser.lr, recipe.optimiser.eps) == (1e-4, 6.25e-10)


UNKNOWN = [
    ("sae.kk", "sae.k"),
    ("lr", "optimiser.lr"),
    ("sae.d_sea", "sae.d_sae"),
    ("optimizer", "optimiser"),
    ("data.held_out", "data.held_out_one_in"),
    ("run.loger", "run.logger"),
    ("site.modul", "site.module"),
]


@pytest.mark.parametrize(("key", "nearest"), UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_in_changes_and_in_files(key, nearest, tmp_path):
    said = f"unknown key '{key}'; did you mean '{nearest}'?"
    assert said in refused({key: 1})
    data: dict = {}
    *groups, last = key.split(".")
    inner = data
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = 1
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    assert f"mine.yaml: {said}" in refused({}, path)


WRONG = [
    ({"sae.k": 9000}, "k=9000 is more than d_sae=8192"),
    ({"sae.d_sae": -1}, "sae.d_sae: Input should be greater than 0 (got -1)"),
    ({"train_tokens": 5}, "train_tokens=5 is less than batch=1024"),
    ({"batch": "many"}, "batch: Input should be a valid integer"),
    ({"batch": 8, "batch.x": 1}, "'batch' is a value, not a group"),
    ({"architecture": "topkk"}, "Did you mean 'topk'?"),
    ({"tokens.context": 1, "tokens.skip_first": 1}, "skip_first leaves nothing"),
    ({"run.logger": "tensorboard"}, "wandb"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_values_are_refused_in_one_line(changes, said):
    assert said in refused(changes)


def test_what_is_no_recipe_is_refused(tmp_path):
    for content, said in [("name: [x\n", "mine.yaml"), ("- a\n", "keys and values")]:
        (tmp_path / "mine.yaml").write_text(content)
        assert said in refused({}, tmp_path / "mine.yaml")
    assert "is a folder" in refused({}, tmp_path)
    assert "Did you mean 'gpt2-small'?" in refused({}, "gpt2-smal")
    assert find_recipe("gpt2-small").name == "gpt2-small.yaml"


@pytest.mark.parametrize(
    ("item", "value"),
    [("a.b=3", 3), ("a.b=1e-4", "1e-4"), ("a.b=null", None), ("a.b=x=y", "x=y"), ("a.b=", None)],
)
def test_changes_are_read_as_yaml(item, value):
    assert parse_change(item) == ("a.b", value)


def test_what_is_no_change_is_refused():
    for item in ("a.b", "=3", "a=[1"):
        with pytest.raises(ConfigError):
            parse_change(item)


def test_numbers_may_be_written_as_people_write_them():
    changes = {"train_tokens": "1e6", "optimiser.lr": "5e-4", "batch": "2e2"}
    recipe = read_recipe({}, changes)
    assert (recipe.train_tokens, recipe.optimiser.lr, recipe.batch) == (1_000_000, 5e-4, 200)


def test_the_learning_rate_follows_the_law_of_gao_et_al():
    small, large = (resolve(read_recipe({}, {"sae.d_sae": size})) for size in (4096, 65536))
    assert small.optimiser.lr / large.optimiser.lr == pytest.approx(4, rel=1e-3)
    assert resolve(read_recipe({}, {"optimiser.lr": 0.5})).optimiser.lr == 0.5


def test_an_option_of_another_architecture_says_whose_it_is():
    recipe = {"architecture": "jumprelu", "sae": {"d_sae": 64, "k": 3}}
    said = "'sae.k' is an option of topk, batchtopk, matryoshka, not of jumprelu: give all"
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_recipe(recipe)


def test_betas_follow_the_architecture():
    for architecture in ARCHITECTURES:
        settings = resolve(read_recipe({"architecture": architecture})).optimiser
        expected = 0.0 if architecture == "gated" else 0.9
        assert (settings.beta1, settings.beta2) == (expected, 0.999)


def test_a_pass_is_stored_where_it_is_seen_again():
    def store(**data):
        return resolve(read_recipe({"data": data, "train_tokens": 5000})).data.store

    assert store(dataset="x", tokens=3000) is True
    assert store(dataset="x", tokens=5000) is False
    assert store(dataset="x") is False
    assert store(dataset="x", tokens=3000, store=False) is False


def test_a_partial_site_or_token_rule_is_laid_over_the_defaults_where_that_makes_sense():
    assert read_recipe({}, {"tokens.context": 64}).tokens.skip_first == 1
    assert read_recipe({}, {"site.revision": "x"}).site.module == "model.layers.15"
    assert read_recipe({}, {"site.layer": 3}).site == Site(model=SMOLLM2, layer=3)
    other = read_recipe({"site": {"model": "gpt2", "layer": 3}}).site
    assert other == Site(model="gpt2", layer=3)


def test_differences_name_keys_and_leave_out_how_a_run_is_watched():
    one, two = (
        read_recipe({}, changes).model_dump(mode="json")
        for changes in ({}, {"sae.k": 3, "run.log_every": 1})
    )
    assert differences(one, two) == ["sae.k was 32, is now 3"]


OWN = """
from saezoo_train.architectures import ARCHITECTURES
class Mine(ARCHITECTURES["topk"]):
    pass
Other = 3
"""


def test_an_architecture_of_ones_own_lies_beside_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "own_sae_a.py").write_text(OWN)
    path = tmp_path / "mine.yaml"
    path.write_text("architecture: own_sae_a:Mine\nsae: {k: 3}\n")
    assert read_recipe(path).sae.k == 3
    for name, said in [
        ("own_sae_a:Other", "is no subclass of"),
        ("own_sae_b:Mine", "own_sae_b.py should lie beside the recipe"),
    ]:
        path.write_text(f"architecture: {name}\n")
        assert said in refused({}, path)


@pytest.mark.parametrize("file", ["config.json", "sae.safetensors"])
def test_a_recipe_in_a_models_folder_never_runs_code(file, tmp_path):
    (tmp_path / file).write_text("{}")
    (tmp_path / "own_sae_c.py").write_text("raise SystemExit('this code ran')\n")
    (tmp_path / "r.yaml").write_text("architecture: own_sae_c:Mine\n")
    assert "no code is run from there" in refused({}, tmp_path / "r.yaml")


def test_every_field_of_a_recipe_is_in_the_docs():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([\w.]+)`", page))
    recipe = read_recipe({}).model_dump()
    groups = ("data", "buffer", "optimiser", "run")
    keys = set(recipe) - set(groups) | {
        f"{group}.{key}" for group in groups for key in recipe[group]
    }
    for options in (architecture.Options for architecture in ARCHITECTURES.values()):
        keys |= {f"sae.{key}" for key in options.model_fields}
    assert not keys - words, sorted(keys - words)
