"""`saezoo train` and `saezoo plot-run`: what a person types, and what they are told before hours
are spent.
"""

import json
import os
import signal

import pytest
import yaml
from saezoo_train import Watch
from saezoo_train.reading import read_recipe

from saezoo.cli import main
from saezoo.load import load_sae
from tests.tiny_host import recipe, write_host, write_texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return write_host(tmp_path_factory.mktemp("host"))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """(exit code, stdout, stderr) of `saezoo …` in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            main(list(map(str, words)))
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


@pytest.fixture
def mine(host, tmp_path):
    """A recipe's file, made of the tiny recipe and changes."""

    def write(**changes):
        data = write_texts(tmp_path / "docs.jsonl", 60)
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe(host, data, **changes)))
        return "mine.yaml"

    return write


def test_a_recipe_becomes_a_folder_and_its_curves(run, mine, tmp_path):
    code, out, err = run("train", mine(), "--out", "sae", "sae.k=3")
    assert code == 0
    assert load_sae(tmp_path / "sae").cfg.k == 3
    assert "FVU" in out
    assert 'load_sae("./sae")' in out
    assert "training: 3,840 tokens" in err
    code, out, _ = run("train", "mine.yaml", "--out", "sae", "sae.k=3", "--json")
    assert json.loads(out)["was_done"] is True
    code, out, _ = run("plot-run", "sae")
    assert code == 0
    assert (tmp_path / "sae.run" / "curves.png").is_file()


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(run, mine, monkeypatch):
    class Interrupts(Watch):
        def progress(self, done):
            if done == 64 * 20:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("saezoo_train.display.make_watch", lambda _title: Interrupts())
    code, out, err = run("train", mine(), "data={dataset: docs.jsonl}", "--out", "sae")
    assert code == 130
    assert not out
    # as a shell takes it
    words = "saezoo train mine.yaml 'data={dataset: docs.jsonl}' --out sae"
    said = f"stopped after step 20 of 60; to go on: {words}\n"
    assert err.endswith(said)
    monkeypatch.undo()


def test_print_config_prints_every_field_as_a_recipe(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "gpt2-small", "sae.k=64", "--print-config"])
    printed = capsys.readouterr().out
    (tmp_path / "all.yaml").write_text(printed)
    assert read_recipe(tmp_path / "all.yaml") == read_recipe(yaml.safe_load(printed))
    assert "k: 64" in printed
    assert "checkpoint_minutes: 10.0" in printed
    assert run("train", "--list")[1].count("\n") >= 6


def test_a_dry_run_estimates_and_starts_nothing(run, mine, tmp_path):
    name = mine()
    before = sorted(tmp_path.iterdir())
    code, out, _ = run("train", name, "--out", "sae", "--dry-run")
    assert code == 0
    for said in ("12 -> 48 features on the output of model.layers.0", "60 steps", "memory", "disk"):
        assert said in out
    facts = json.loads(run("train", name, "--dry-run", "--json")[1])
    assert facts["steps"] == 60
    assert facts["host_tokens"] == 3840
    parameters = 2 * 48 * 12 + 48 + 12
    assert facts["disk"] == parameters * (2 * 12 + 4)
    assert sorted(tmp_path.iterdir()) == before


BAD = [
    (["sae.k=49"], "k=49 is more than d_sae=48"),
    (["sae.kk=3"], "unknown key 'sae.kk'; did you mean 'sae.k'?"),
    (["site.module=model.layer.0"], "has no module 'model.layer.0'. Closest: model.layers.0"),
    (["site.layer=2"], "has no layer 2; its layers are 0 to 1"),
    (["site.point=mlp_out"], "give site.module"),
    (["data.dataset=nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["data.dataset=few.jsonl", "data.measure_on=docs.jsonl"], "gave 31 activations, and a batch"),
    (["data.dataset=empty.jsonl"], "no document is held out"),
    (["data.dataset=empty.jsonl", "data.measure_on=docs.jsonl"], "gave 0 activations"),
    (["data.column=body"], "no text under 'body'; it has text"),
    (["tokens.context=1000"], "reads at most 64 tokens"),
    (["run.device=cuda:99"], "this machine has no such device"),
    (["site.model=./nowhere"], "could not be loaded"),
    (["sae.d_sae=100000000000"], "GB of memory, and this machine has"),
    (["data.tokens=100000000000000", "data.store=true"], "are free; checkpoints"),
    (["nonsense"], "is neither a recipe nor key=value"),
    (["architecture=mine:SAE"], "mine.py should lie beside the recipe"),
]


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize(("changes", "said"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_line_before_anything_is_spent(run, mine, tmp_path, changes, said, dry):
    name = mine()
    write_texts(tmp_path / "few.jsonl", 1)
    (tmp_path / "empty.jsonl").write_text("")
    code, out, err = run("train", name, *changes, "--out", "sae", *(["--dry-run"] if dry else []))
    assert code == 1
    assert not out
    last = err.splitlines()[-1]
    assert last.startswith("saezoo: ")
    assert said in last
    assert not (tmp_path / "sae").exists()
    # nothing of it stands in the way of the corrected command
    code, _, err = run("train", name, "--out", "sae", "train_tokens=128")
    assert code == 0, err


def test_a_model_without_access_says_where_its_licence_is_accepted(run, mine, hub):
    hub.commit("org/gated", {"config.json": b'{"model_type": "llama"}'})
    hub.repos["org/gated"].gated = True
    code, _, err = run("train", mine(), "site.model=org/gated")
    assert code == 1
    assert "accept its licence at https://huggingface.co/org/gated" in err.splitlines()[-1]


def test_a_recipe_must_be_named(run):
    code, _, err = run("train")
    assert code == 1
    assert "saezoo train --list" in err
    assert "Did you mean 'gpt2-small'" in run("train", "gpt2-smal")[2]
