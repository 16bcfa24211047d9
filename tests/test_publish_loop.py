"""The loop: recipe, train, publish to a Hub, load by name on another machine, register. What is
loaded computes what was trained, bit for bit.
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from saezoo_train import train_sae

import saezoo
from saezoo import find_sae, publish_sae
from saezoo.check import check_sae
from saezoo.errors import NoAccess, PublishError
from saezoo.files import sha256_of
from saezoo.hub import fetch
from saezoo.load import load_sae
from saezoo.publishing.registering import add_to_registry
from saezoo.stats import feature_stats
from saezoo.zoo import Terms, add_zoo, update_zoos
from tests.fakes.hub_lfs import User
from tests.tiny_host import recipe, write_host, write_texts

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = "hf_" + "s3cr3t" * 5
REPO = "my-org/my-saes"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of two SAEs, on layers 0 and 1 of a host that is called as on the Hub."""
    root = tmp_path_factory.mktemp("training")
    write_host(root / "my-org" / "tiny-llama")
    texts = write_texts(root / "docs.jsonl", 60)
    for layer in (0, 1):
        made = recipe("my-org/tiny-llama", texts, origin={"licence": "MIT", "author": "my-org"})
        made["site"] = {"model": "my-org/tiny-llama", "layer": layer}
        with contextlib.chdir(root):
            train_sae(made | {"name": f"layer_{layer}"}, root / "saes" / f"layer_{layer}")
    return root / "saes"


@pytest.fixture(autouse=True)
def me(hub, cache, monkeypatch):  # noqa: ARG001 a fresh cache
    hub.users[TOKEN] = User("me", writes={"me", "my-org"})
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def another_machine(tmp_path, monkeypatch):
    """Another cache, and no token."""

    def go(name):
        monkeypatch.setenv("SAEZOO_CACHE", str(tmp_path / name))
        monkeypatch.delenv("HF_TOKEN", raising=False)

    return go


def same_sae(one, two):
    assert one.cfg == two.cfg
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    x = torch.randn(30, one.d_in)
    assert torch.equal(one(x), two(x))
    assert torch.equal(one.encode(x), two.encode(x))


def test_what_was_trained_is_loaded_by_name_elsewhere(hub, trained, another_machine):
    folder = trained / "layer_0"
    done = publish_sae(folder, REPO)
    assert done.names == [f"hf://{REPO}@{done.revision}"]
    assert hub.repos[REPO].branches["main"] == done.revision
    another_machine("elsewhere")
    mine = load_sae(folder)
    for name in (*done.names, f"hf://{REPO}", f"hf://{REPO}#layer_0_resid_post"):
        same_sae(load_sae(name, verify=True), mine)
    assert all(finding.ok for finding in check_sae(f"hf://{REPO}#layer_0_resid_post"))


def test_another_process_with_nothing_but_the_name_gets_the_same(trained, tmp_path):
    done = publish_sae(trained / "layer_0", REPO)
    x = torch.linspace(-2, 2, 60).reshape(5, 12)
    code = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from saezoo import load_sae\n"
        "x = torch.linspace(-2, 2, 60).reshape(5, 12)\n"
        "print(json.dumps(load_sae(sys.argv[1])(x).double().tolist()))\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    ran = subprocess.run(
        [sys.executable, "-c", code, done.names[0]],
        env=env | {"SAEZOO_CACHE": str(tmp_path / "other"), "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ran.stdout) == load_sae(trained / "layer_0")(x).double().tolist()


def test_a_folder_of_many_is_one_collection_in_one_commit(hub, trained, another_machine):
    done = publish_sae(trained, REPO, exports=["saelens"])
    assert len(hub.log) == 1
    assert set(hub.log[0]["paths"]) == {file.path for file in done.files}
    another_machine("elsewhere")
    pin = add_zoo(f"hf://{REPO}")
    assert (pin.release, pin.commit) == ("my-saes", done.revision)
    for layer in (0, 1):
        mine = load_sae(trained / f"layer_{layer}")
        same_sae(load_sae(f"zoo/my-saes/layer_{layer}"), mine)
        same_sae(load_sae(f"hf://{REPO}@{done.revision}/layer_{layer}"), mine)
        entry = find_sae(f"zoo/my-saes/layer_{layer}")
        assert (entry.layer, entry.licence, entry.d_sae) == (layer, "MIT", 48)
        x = torch.randn(7, 12)
        peer = load_sae(f"hf://{REPO}/layer_{layer}/saelens")
        assert torch.allclose(peer(x), mine(x), atol=1e-5)


def test_golden_outputs_and_stats_come_along(trained, another_machine):
    publish_sae(trained, REPO)
    another_machine("elsewhere")
    fetch(find_sae(f"hf://{REPO}#layer_1"), extras=True)
    stats = feature_stats(load_sae(f"hf://{REPO}#layer_1"))
    expected = feature_stats(load_sae(trained / "layer_1"))
    assert all(torch.equal(stats[name], expected[name]) for name in expected)
    found = {row.what: row.ok for row in check_sae(f"hf://{REPO}#layer_1")}
    assert found == {"files": True, "hash": True, "shapes": True, "finite": True, "golden": True}


def test_the_card_says_what_was_measured_and_by_which_recipe(hub, trained):
    done = publish_sae(trained / "layer_0", REPO)
    readme = hub.repos[REPO].commits[done.revision]["README.md"].decode()
    assert readme == done.card
    facts = load_sae(trained / "layer_0").cfg.metrics
    assert f"| FVU: variance unexplained, 0 is perfect | {facts['fvu']:.4f} |" in readme
    assert "d_sae: 48" in readme
    assert "data: docs.jsonl" in readme
    assert ModelCard(readme).data.base_model == "my-org/tiny-llama"


def test_the_fresh_folders_readme_is_the_same_text(trained):
    fresh = (trained / "layer_0" / "README.md").read_text(encoding="utf-8")
    done = publish_sae(trained / "layer_0", REPO)

    def common(text):
        """Without what depends on where it lies."""
        return [
            line
            for line in text.partition("## What it computes")[2].splitlines()
            if "density.png" not in line and "How often features fire" not in line and line
        ]

    assert common(fresh) == common(done.card)
    assert 'load_sae("./layer_0")' in fresh
    assert f'load_sae("hf://{REPO}")' in done.card


def test_published_again_nothing_is_sent_and_a_new_one_moves_the_zoo(hub, trained, another_machine):
    first = publish_sae(trained / "layer_0", REPO, path="layer_0")
    hub.log.clear()
    again = publish_sae(trained / "layer_0", REPO, path="layer_0")
    assert not hub.log
    assert (again.revision, {file.state for file in again.files}) == (first.revision, {"same"})
    second = publish_sae(trained / "layer_1", REPO, path="layer_1")
    assert {"layer_1/sae.safetensors", "README.md", "saezoo.yaml"} <= set(hub.log[0]["paths"])
    assert "layer_0/sae.safetensors" not in hub.log[0]["paths"]
    assert "| `layer_0` | 0 |" in second.card
    another_machine("elsewhere")
    add_zoo(f"hf://{REPO}@{first.revision}", Terms())
    assert update_zoos([])[0].error is None
    same_sae(load_sae(f"hf://{REPO}#layer_1"), load_sae(trained / "layer_1"))
    same_sae(load_sae(f"hf://{REPO}#layer_0"), load_sae(trained / "layer_0"))


def test_a_dry_run_asks_and_sends_nothing(hub, trained, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    shown = publish_sae(trained, REPO, dry_run=True)
    assert not hub.log
    assert REPO not in hub.repos
    assert not [path for method, path, _ in hub.requests if method not in ("GET", "HEAD")]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = publish_sae(trained, REPO)
    assert (shown.card, shown.manifest, shown.files) == (done.card, done.manifest, done.files)
    assert done.stanza == shown.stanza.replace(
        f"source: hf://{REPO}\n", f"source: hf://{REPO}\n  revision: {done.revision}\n"
    )


def test_a_dry_run_without_a_hub_shows_it_as_for_a_new_repo(hub, trained, monkeypatch):
    hub.fail("/api/models", "status", status=503, times=99)
    monkeypatch.setattr("saezoo.publishing.targets.read_head", _unreachable)
    shown = publish_sae(trained / "layer_0", REPO, dry_run=True)
    assert "the Hub was not asked" in shown.note
    assert {file.state for file in shown.files} == {"new"}
    with pytest.raises(saezoo.SaezooError):
        publish_sae(trained / "layer_0", REPO)


def _unreachable(repo, **_options):
    from saezoo.errors import Offline

    raise Offline(f"{repo}: no network")


def test_without_a_token_nothing_is_begun(hub, trained, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NoAccess, match="hf auth login"):
        publish_sae(trained, REPO)
    assert not hub.log


def test_another_model_at_the_root_is_not_written_over(hub, trained):
    before = {"config.json": b'{"model_type": "llama"}', "README.md": b"# A model\n"}
    hub.commit(REPO, before)
    with pytest.raises(PublishError, match="something else has that path"):
        publish_sae(trained / "layer_0", REPO)
    assert not hub.log
    done = publish_sae(trained / "layer_0", REPO, path="saes/layer_0")
    files = hub.repos[REPO].commits[done.revision]
    assert files["config.json"] == before["config.json"]
    assert files["README.md"].count(b"# A model\n") == 1


def test_no_file_and_no_output_holds_the_token(hub, trained, tmp_path):
    done = publish_sae(trained, REPO)
    for body in hub.repos[REPO].commits[done.revision].values():
        assert TOKEN.encode() not in body
    assert TOKEN not in json.dumps(done.to_json())
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_the_stanza_registers_it_and_then_it_has_a_short_name(
    trained, tmp_path, registry_at, monkeypatch, another_machine
):
    folder = tmp_path / "registry"
    folder.mkdir()
    registry_at(folder)
    monkeypatch.setattr("saezoo.verify.registry_folder", lambda: folder)
    done = publish_sae(trained, REPO)
    (tmp_path / "stanza.yaml").write_text(done.stanza)
    added = add_to_registry(tmp_path / "stanza.yaml")
    assert added.ids == ["layer_0", "layer_1"]
    another_machine("elsewhere")
    same_sae(load_sae("my-saes/layer_1"), load_sae(trained / "layer_1"))
    entry = find_sae("my-saes/layer_1")
    weights = trained / "layer_1" / "sae.safetensors"
    assert (entry.revision, entry.sha256) == (
        done.revision,
        {"sae.safetensors": sha256_of(weights)},
    )
    assert all(finding.ok for finding in check_sae("my-saes/layer_1"))
    # the repo's own manifest says the same
    (folder / "my-saes.yaml").unlink()
    add_to_registry(f"hf://{REPO}")
    assert yaml.safe_load((folder / "my-saes.yaml").read_text()) == yaml.safe_load(done.stanza)
