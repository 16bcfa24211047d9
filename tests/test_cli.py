"""The command line: every command has help with an example, says errors in one line, and speaks
JSON.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import click
import pytest

from saezoo.cli import cli, main
from saezoo.cli._print import HELP

BUNDLED = "smollm2-135m-instruct/layer_15_resid_post"


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of `saezoo …`, in this process."""

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


def commands(group, before=""):
    """(words, command) of a group and all below it."""
    for name, command in group.commands.items():
        yield f"{before}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")


@pytest.mark.parametrize(("name", "command"), list(commands(cli)), ids=lambda v: str(v))
def test_every_command_has_help_for_itself_and_each_option_and_an_example(name, command):
    text = command.get_help(click.Context(command, info_name=f"saezoo {name}", **HELP))
    assert "Example" in text
    assert f"saezoo {name}" in text
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize(
    "words", [["-h"], ["--help"], ["list", "-h"], ["demo", "-h"], [], ["zoo"]], ids=" ".join
)
def test_help_is_had_by_either_flag(run, words):
    code, out, _ = run(*words)
    assert code == 0
    assert "Usage: saezoo" in out


def test_the_version_is_the_packages(run):
    import saezoo

    assert run("--version")[1] == f"saezoo {saezoo.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "openai-gpt2-smal/x"], "openai-gpt2-small"),
        (["info", "EleutherAI/nothing"], "hf://EleutherAI/nothing"),
        (["check", "./nowhere"], "nowhere"),
        (["check", "a/../b"], ".."),
        (["convert", BUNDLED, "./x", "--to", "openai"], "written: native, sparsify"),
        (["download", "ftp://host/file"], "ftp"),
        (["info"], "saezoo info -h"),
        (["nope"], "saezoo -h"),
        (["list", "--layer", "x"], "saezoo list -h"),
        (["demo", "--text", "a", "--file", "pyproject.toml"], "saezoo demo -h"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_on_stderr_and_exit_code_1(run, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 1
    assert not out
    assert err.startswith("saezoo: ")
    assert err.count("\n") == 1
    assert said in err


def test_debug_shows_the_traceback_wherever_it_stands():
    for words in (["--debug", "check", "./nowhere"], ["check", "./nowhere", "--debug"]):
        command = [sys.executable, "-m", "saezoo", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def test_check_prints_a_table_and_json_and_fails_when_something_is_wrong(run, tmp_path):
    code, out, _ = run("check", BUNDLED)
    assert code == 0
    assert re.search(r"golden +ok", out)
    findings = json.loads(run("check", BUNDLED, "--json")[1])
    assert {row["what"] for row in findings} == {"files", "hash", "shapes", "finite", "golden"}
    copy = tmp_path / "copy"
    assert run("convert", BUNDLED, str(copy))[0] == 0
    (copy / "sae.safetensors").write_bytes((copy / "sae.safetensors").read_bytes()[:-100])
    code, out, _ = run("check", str(copy))
    assert code == 1
    assert "WRONG" in out


def test_convert_prints_its_proof(run, tmp_path):
    code, out, _ = run("convert", BUNDLED, str(tmp_path / "out"), "--to", "sparsify")
    assert code == 0
    assert "proof: largest difference" in out
    assert "sparsify's own formula" in out
    proof = json.loads(run("convert", BUNDLED, str(tmp_path / "again"), "--json")[1])
    assert proof["difference"] <= proof["tolerance"]


def test_info_says_where_the_files_are_and_that_the_bundled_ones_are_here(run):
    code, out, _ = run("info", BUNDLED)
    assert code == 0
    assert "bundled" in out
    facts = json.loads(run("info", "openai-gpt2-small/resid_post_mlp_v5_32k/8", "--json")[1])
    assert facts["path"] == "resid_post_mlp_v5_32k/autoencoders/8.pt"
    assert "not in the cache" in facts["cached"]


def test_download_of_the_bundled_needs_no_network(run):
    done = json.loads(run("download", BUNDLED, "--offline", "--json")[1])
    assert done[0]["format"] == "native"
    assert os.path.isdir(done[0]["path"])


def test_list_shows_releases_then_entries_and_all_of_them_as_json(run):
    code, out, _ = run("list")
    assert code == 0
    assert re.search(r"openai-gpt2-small +.*144", out)
    rows = json.loads(run("list", "openai-gpt2-small", "--layer", "8", "--json")[1])
    assert len(rows) == 12
    assert {row["site"]["layer"] for row in rows} == {8}
    names = run("list", "openai-gpt2-small", "--names")[1].split()
    assert len(names) == 144


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m saezoo list openai-gpt2-small --names | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert not done.stderr


def test_ctrl_c_ends_with_a_line_that_says_what_is_left(hub):
    hub.commit("org/slow", {"layers.1/cfg.json": b"{}", "layers.1/sae.safetensors": b"x"})
    hub.fail("/api/models", "status", status=503, headers={"Retry-After": "50"}, times=9)
    command = [sys.executable, "-m", "saezoo", "download", "hf://org/slow/layers.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        while not hub.requests:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
