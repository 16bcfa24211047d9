"""Nothing is lost: a killed run goes on to the very weights of one that was not, Ctrl-C saves, a
full disk leaves the old checkpoint whole.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saezoo_train import Watch, architectures, train_sae
from saezoo_train.checkpoint import last_checkpoint, save_checkpoint
from saezoo_train.metrics_log import read_rows

from saezoo.errors import Stopped, TrainingError
from tests.tiny_host import recipe, write_host, write_texts

TIMES = {"seconds", "tokens_per_second"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return write_host(tmp_path_factory.mktemp("host"))


def untimed(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights(folder):
    return (folder / "sae.safetensors").read_bytes()


@pytest.mark.parametrize("stored", [False, True], ids=["read again", "stored"])
def test_runs_killed_at_random_moments_end_with_the_weights_of_one_that_was_not(
    host, stored, tmp_path
):
    data = write_texts(tmp_path / "docs.jsonl", 60)
    store = {"tokens": 1500, "store": True} if stored else {}
    chosen = recipe(
        host, data, data={"measure_on": None, **store}, save_dtype="float32", train_tokens=64 * 48
    )
    train_sae(chosen, tmp_path / "whole")
    often = chosen | {"run": {"checkpoint_minutes": 1e-6, "log_every": 10, "device": "cpu"}}
    script = Path(__file__).parent / "killed_runs.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(often), str(tmp_path / "killed"), "4"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["died"] >= 2
    assert told["within"] >= 1
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "killed.run") == untimed(tmp_path / "whole.run")
    assert not list((tmp_path / "killed.run").glob(".checkpoint-*"))


class At(Watch):
    """Does something once this step was made."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def phase(self, name, *_, **__):
        self.name = name

    def progress(self, done):
        if self.name == "training" and done == self.step * 64:
            self.act()


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "docs.jsonl", 60)


class Noisy(architectures.ARCHITECTURES["topk"]):
    """Draws random numbers in every step, as an architecture of one's own may."""

    def training_step(self, x_BD, step):
        return super().training_step(x_BD + 0.1 * torch.randn(x_BD.shape), step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_and_the_same_call_goes_on_to_the_same_weights(
    host, data, number, tmp_path, monkeypatch
):
    monkeypatch.setitem(architectures.ARCHITECTURES, "noisy", Noisy)
    chosen = recipe(host, data, save_dtype="float32", architecture="noisy")
    train_sae(chosen, tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="after step 27 of 60"):
        train_sae(chosen, tmp_path / "b", watch=At(27, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is before
    assert last_checkpoint(tmp_path / "b.run").step == 27
    done = train_sae(chosen, tmp_path / "b")
    assert done.resumed_at == 27
    assert weights(tmp_path / "b") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "b.run") == untimed(tmp_path / "whole.run")


def test_a_second_signal_stops_at_once(host, data, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_sae(recipe(host, data), tmp_path / "out", watch=At(10, twice))


def stopped(chosen, out, step=20):
    """A run that was stopped after a step."""
    with pytest.raises(Stopped):
        train_sae(chosen, out, watch=At(step, lambda: os.kill(os.getpid(), signal.SIGINT)))


def test_a_finished_run_is_finished_and_fresh_starts_it_over(host, data, tmp_path):
    chosen = recipe(host, data)
    first = train_sae(chosen, tmp_path / "out")
    assert not list((tmp_path / "out.run").glob("checkpoint-*"))
    again = train_sae(chosen, tmp_path / "out")
    assert again.was_done
    assert again.metrics == first.metrics
    fresh = train_sae(chosen | {"seed": 1}, tmp_path / "out", fresh=True)
    assert not fresh.was_done
    assert fresh.metrics["fvu"] != first.metrics["fvu"]
    assert len(untimed(tmp_path / "out.run")) == 6


def test_a_checkpoint_of_another_recipe_is_refused_naming_what_differs(host, data, tmp_path):
    chosen = recipe(host, data)
    stopped(chosen, tmp_path / "out")
    said = r"optimiser\.lr was 0\.003, is now 0\.1; .*--fresh"
    with pytest.raises(TrainingError, match=said) as caught:
        train_sae(chosen, tmp_path / "out", changes={"optimiser.lr": 0.1})
    assert "\n" not in str(caught.value)
    # how a run is watched is no part of what is trained
    done = train_sae(chosen, tmp_path / "out", changes={"run.log_every": 5})
    assert done.resumed_at == 20


def test_data_that_changed_since_the_checkpoint_is_refused(host, data, tmp_path):
    chosen = recipe(host, data)
    stopped(chosen, tmp_path / "out")
    write_texts(data, 61)
    with pytest.raises(TrainingError, match="changed since this run began"):
        train_sae(chosen, tmp_path / "out")


def test_a_folder_that_no_run_made_is_left_alone(host, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(TrainingError, match="name another --out"):
        train_sae(recipe(host, data), tmp_path / "mine", fresh=True)
    assert not (tmp_path / "mine.run").exists()


def test_two_processes_do_not_train_into_one_folder(host, data, tmp_path):
    from filelock import FileLock

    (tmp_path / "out.run").mkdir()
    with (
        FileLock(tmp_path / "out.run" / ".lock"),
        pytest.raises(TrainingError, match="another process"),
    ):
        train_sae(recipe(host, data), tmp_path / "out")


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    state = {"model/W": torch.randn(4000)}
    save_checkpoint(tmp_path, {"step": 7}, state, {"mean_D": torch.zeros(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(TrainingError, match="checkpoint-00000007 stays whole") as caught:
            save_checkpoint(tmp_path, {"step": 9}, state, {"mean_D": torch.zeros(3)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint-00000007"]
    kept = last_checkpoint(tmp_path)
    assert kept.step == 7
    assert torch.equal(kept.state()["model/W"], state["model/W"])


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis_and_the_last_good_checkpoint(
    host, data, tmp_path
):
    chosen = recipe(host, data, optimiser={"lr": 1e30, "warmup_steps": 0})
    saving = chosen | {"run": {"checkpoint_minutes": 1e-6, "log_every": 10, "device": "cpu"}}
    with pytest.raises(TrainingError, match="not finite") as caught:
        train_sae(saving, tmp_path / "out")
    for said in ("step ", "try optimiser.lr=", "clip_norm"):
        assert said in str(caught.value)
    state = last_checkpoint(tmp_path / "out.run").state()
    assert all(value.isfinite().all() for key, value in state.items() if key.startswith("model/"))


def test_an_exploding_loss_stops(host, data, tmp_path, monkeypatch):
    class Explodes(architectures.ARCHITECTURES["topk"]):
        def training_step(self, x_BD, step):
            if step == 30:
                self.W_dec.data.mul_(1e4)
            return super().training_step(x_BD, step)

    monkeypatch.setitem(architectures.ARCHITECTURES, "explodes", Explodes)
    with pytest.raises(TrainingError, match="step 40: the loss exploded: FVU"):
        train_sae(recipe(host, data, architecture="explodes"), tmp_path / "out")
