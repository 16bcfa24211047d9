"""Publishing to a folder: the tree that a repo gets, atomic, repeatable, and a live zoo at once;
the bundled SAE is one of these.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

import saezoo
from saezoo import publish_sae
from saezoo.cli import main
from saezoo.errors import NotPublishable, PublishError
from saezoo.find import find_sae
from saezoo.load import load_sae
from saezoo.publishing import local
from saezoo.zoo import add_zoo
from tests.tiny_folders import at_layer, files_of, write_native

pytestmark = pytest.mark.usefixtures("one_thread", "cache")

BUNDLED = Path(saezoo.__file__).parent / "bundled" / "smollm2-135m-instruct"
NAME = "smollm2-135m-instruct/layer_15_resid_post"


def test_what_is_written_loads_by_its_id_and_as_a_zoo(tmp_path):
    folder = write_native(tmp_path / "sae")
    done = publish_sae(folder, tmp_path / "zoo", path="layer_3")
    x = torch.randn(5, 6)
    expected = load_sae(folder)(x)
    assert done.names == [f"{tmp_path}/zoo#layer_3"]
    assert torch.equal(load_sae(done.names[0])(x), expected)
    add_zoo(tmp_path / "zoo")
    assert torch.equal(load_sae("zoo/zoo/layer_3")(x), expected)
    assert find_sae("zoo/zoo/layer_3").licence == "MIT"
    assert all(finding.ok is not False for finding in done.findings)
    assert {"layer_3: golden", "layer_3: hash"} <= {f.what for f in done.findings if f.ok}


def test_it_can_be_repeated_and_then_writes_nothing(tmp_path):
    folder = write_native(tmp_path / "sae")
    first = publish_sae(folder, tmp_path / "zoo")
    assert {file.state for file in first.files} == {"new"}
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "zoo").iterdir()}
    again = publish_sae(folder, tmp_path / "zoo")
    assert {file.state for file in again.files} == {"same"}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "zoo").iterdir()} == times


def test_one_after_the_other_is_the_same_as_all_at_once(tmp_path):
    for layer in (1, 2, 10):
        write_native(tmp_path / "saes" / f"layer_{layer}", site=at_layer(layer), seed=layer)
    publish_sae(tmp_path / "saes", tmp_path / "a" / "zoo", exports=["saelens"])
    for layer in (2, 10, 1):
        name = f"layer_{layer}"
        target = tmp_path / "b" / "zoo"
        publish_sae(tmp_path / "saes" / name, target, path=name, exports=["saelens"])
    one, two = files_of(tmp_path / "a" / "zoo"), files_of(tmp_path / "b" / "zoo")
    # what all share was not known when the first was written, so that rows say more than they need
    rows = [yaml.safe_load(files.pop("saezoo.yaml"))["saes"] for files in (one, two)]
    assert one == two
    assert [[row["id"] for row in each] for each in rows] == [
        ["layer_1", "layer_2", "layer_10"]
    ] * 2


def test_the_card_is_about_what_was_published_before_too(tmp_path):
    zoo = tmp_path / "zoo"
    publish_sae(write_native(tmp_path / "one", site=at_layer(1)), zoo, path="layer_1")
    with (zoo / "saezoo.yaml").open("a") as file:
        file.write("- id: gone\n  path: gone\n- id: broken\n  path: broken\n")
    (zoo / "broken").mkdir()
    (zoo / "broken" / "config.json").write_text("[" * 100_000)
    done = publish_sae(write_native(tmp_path / "two", seed=2), zoo, path="layer_3")
    assert "| `layer_1` | 1 |" in done.card
    assert "| `layer_3` | 3 |" in done.card
    assert "gone" not in done.card
    assert "broken" not in done.card
    assert {"layer_1", "gone", "broken", "layer_3"} == {
        row["id"] for row in yaml.safe_load(done.manifest)["saes"]
    }
    assert len(done.names) == 1


def test_what_others_have_there_is_not_touched(tmp_path):
    zoo = tmp_path / "zoo"
    (zoo / "other").mkdir(parents=True)
    (zoo / "other" / "file.txt").write_text("theirs")
    (zoo / "README.md").write_text("# Theirs\n\nTheir words.\n")
    (zoo / "saezoo.yaml").write_text(
        "release: theirs  # their name\nabout: Their SAEs.\nshared: {format: native}\nsaes:\n"
        "- id: first\n  path: first\n"
    )
    folder = write_native(tmp_path / "sae")
    done = publish_sae(folder, zoo, path="mine")
    files = files_of(zoo)
    assert files["other/file.txt"] == b"theirs"
    assert files["README.md"].count(b"# Theirs\n\nTheir words.\n") == 1
    assert files["saezoo.yaml"].startswith(b"release: theirs  # their name\nabout: Their SAEs.\n")
    assert b"- id: first\n  path: first\n" in files["saezoo.yaml"]
    assert {file.path for file in done.files} <= files.keys()
    x = torch.randn(5, 6)
    assert torch.equal(load_sae(f"{zoo}#mine")(x), load_sae(folder)(x))


def test_files_of_something_else_at_our_path_are_not_written_over(tmp_path):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "config.json").write_text('{"model_type": "llama"}')
    before = files_of(zoo)
    folder = write_native(tmp_path / "sae")
    with pytest.raises(PublishError, match=r"config\.json: something else.*--path"):
        publish_sae(folder, zoo)
    assert files_of(zoo) == before
    publish_sae(folder, zoo, path="sae")
    assert files_of(zoo)["config.json"] == before["config.json"]


def test_a_new_version_takes_the_place_of_the_old_one(tmp_path):
    publish_sae(write_native(tmp_path / "one"), tmp_path / "zoo", path="x")
    new = write_native(tmp_path / "two", seed=5)
    done = publish_sae(new, tmp_path / "zoo", path="x")
    states = {file.path: file.state for file in done.files}
    assert states["x/sae.safetensors"] == "changed"
    x = torch.randn(5, 6)
    assert torch.equal(load_sae(f"{tmp_path}/zoo#x")(x), load_sae(new)(x))


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = write_native(tmp_path / "sae")
    real, calls = local.shutil.copyfile, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(local.shutil, "copyfile", full)
    with pytest.raises(PublishError, match="No space left on device; nothing was written"):
        publish_sae(folder, tmp_path / "zoo")
    assert sorted(os.listdir(tmp_path)) == ["cache", "sae"]
    publish_sae(folder, tmp_path / "zoo")


def test_an_interrupted_one_has_no_name_and_running_it_again_finishes_it(tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    folder = write_native(tmp_path / "sae")
    real, calls = local.shutil.copyfile, []

    def cut(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(local.shutil, "copyfile", cut)
    with pytest.raises(KeyboardInterrupt):
        publish_sae(folder, zoo, path="x")
    assert not {"README.md", "saezoo.yaml"} & files_of(zoo).keys()
    assert len(files_of(zoo)) == 2
    monkeypatch.undo()
    done = publish_sae(folder, zoo, path="x")
    assert [file.state for file in done.files].count("same") == 2
    assert load_sae(f"{zoo}#x").d_sae == 24


def test_what_does_not_come_back_as_it_was_sent_is_an_error_that_says_so(tmp_path, monkeypatch):
    def broken(source, target):
        data = bytearray(Path(source).read_bytes())
        data[-1] ^= 1
        Path(target).write_bytes(data)

    monkeypatch.setattr(local.shutil, "copyfile", broken)
    with pytest.raises(PublishError, match="is written, but what comes back is not what was sent"):
        publish_sae(write_native(tmp_path / "sae"), tmp_path / "zoo")


def test_a_dry_run_shows_all_of_it_and_writes_nothing(tmp_path):
    folder = write_native(tmp_path / "sae")
    shown = publish_sae(folder, tmp_path / "zoo", dry_run=True)
    assert not (tmp_path / "zoo").exists()
    done = publish_sae(folder, tmp_path / "zoo")
    assert (shown.card, shown.manifest, shown.files) == (done.card, done.manifest, done.files)
    assert (tmp_path / "zoo" / "README.md").read_text() == done.card
    assert (tmp_path / "zoo" / "saezoo.yaml").read_text() == done.manifest
    assert not list((tmp_path / "cache").glob(".publish-*"))


def test_words_of_its_author_in_the_folders_readme_go_along(tmp_path):
    folder = write_native(tmp_path / "sae")
    (folder / "README.md").write_text(publish_sae(folder, tmp_path / "a", dry_run=True).card)
    with (folder / "README.md").open("a") as file:
        file.write("\nWhy I made this.\n")
    assert publish_sae(folder, tmp_path / "b").card.endswith("\nWhy I made this.\n")
    (folder / "README.md").write_text("no marks of ours")
    assert "no marks of ours" not in publish_sae(folder, tmp_path / "c").card
    (folder / "README.md").write_text(
        publish_sae(folder, tmp_path / "d").card + "\nIn /home/me/notes.\n"
    )
    with pytest.raises(NotPublishable, match="'/home/me/notes', a path of this machine"):
        publish_sae(folder, tmp_path / "e")


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "zoo").write_text("x")
    with pytest.raises(PublishError, match="is a file"):
        publish_sae(write_native(tmp_path / "sae"), tmp_path / "zoo")


def test_the_bundled_sae_is_what_publish_writes(tmp_path):
    target = tmp_path / BUNDLED.name
    done = publish_sae(NAME, target, path="layer_15_resid_post")
    made, shipped = files_of(target), files_of(BUNDLED)
    assert made.keys() == shipped.keys()
    drawn = "layer_15_resid_post/density.png"
    # how letters are drawn is matplotlib's and differs from version to version
    assert made.pop(drawn)[:8] == shipped.pop(drawn)[:8] == b"\x89PNG\r\n\x1a\n"
    assert made == shipped
    assert f'load_sae("{NAME}")' in done.card
    assert load_sae(f"{BUNDLED}#layer_15_resid_post").d_sae == 5120


def test_only_folders_and_the_bundled_can_be_published(tmp_path):
    for name, said in (
        ("openai-gpt2-small/resid_post_mlp_v5_32k/8", "saezoo convert openai-gpt2-small"),
        (str(tmp_path / "nowhere"), "no such folder"),
        ("hf://org/repo", "no such folder"),
    ):
        with pytest.raises(NotPublishable, match=said):
            publish_sae(name, tmp_path / "zoo")


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of `saezoo publish …`, in this process."""

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            main(["publish", *map(str, words)])
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


def test_the_command_shows_files_and_the_name_to_load(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_native(tmp_path / "sae")
    (tmp_path / "sae" / "optimizer.pt").write_text("x")
    code, out, err = run("./sae", "./zoo-dir", "--exports", "saelens, sparsify")
    assert (code, err) == (0, "")
    assert re.search(r"sae\.safetensors +\d\.\d kB +new", out)
    assert "saelens/cfg.json" in out
    assert "left out, since nobody needs it: sae/optimizer.pt" in out
    name = re.search(r'load_sae\("(.*)"\)', out)[1]
    assert name == "./zoo-dir#layer_3_resid_post"
    assert load_sae(name).d_sae == 24


def test_a_dry_run_prints_card_and_stanza(run, tmp_path):
    code, out, _ = run(write_native(tmp_path / "sae"), tmp_path / "zoo", "--dry-run")
    assert code == 0
    assert "# saezoo:begin" in out
    assert "release: zoo\n" in out
    assert "this was a dry run" in out
    assert not (tmp_path / "zoo").exists()


def test_scripts_get_json(run, tmp_path):
    code, out, _ = run(write_native(tmp_path / "sae"), tmp_path / "zoo", "--json")
    found = json.loads(out)
    assert code == 0
    assert {file["path"] for file in found["files"]} >= {"config.json", "README.md"}
    assert all(finding["ok"] is not False for finding in found["findings"])
    assert found["names"] == [f"{tmp_path}/zoo#layer_3_resid_post"]


def test_each_reason_is_a_line_and_the_exit_code_is_1(run, tmp_path):
    folder = write_native(tmp_path / "sae", origin=None, tokens=None)
    code, out, err = run(folder, tmp_path / "zoo")
    assert (code, out) == (1, "")
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["saezoo", "saezoo"]
    assert "does not say tokens" in err
    assert "--licence" in err
    code, out, err = run(tmp_path / "nowhere", tmp_path / "zoo")
    assert (code, out, err.count("\n")) == (1, "", 1)
