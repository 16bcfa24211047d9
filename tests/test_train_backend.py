"""Who makes the updates: chosen by device and recipe, said once, and a checkpoint of one is a
checkpoint for the other.
"""

import json
import logging
import os
import signal

import pytest
import torch
from saezoo_train import Watch, read_recipe, train_sae
from saezoo_train.backend import Backend, choose_backend
from saezoo_train.config import resolve
from saezoo_train.kernels import reference

from saezoo import gpu
from saezoo.cli import main
from saezoo.errors import ConfigError, Stopped, TrainingError
from saezoo.load import load_sae
from saezoo.numerics import close
from tests.tiny_host import recipe, write_host, write_texts

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return write_host(tmp_path_factory.mktemp("host"))


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "docs.jsonl", 60)


@pytest.fixture
def able(monkeypatch):
    """A machine whose GPU can run the kernels."""
    monkeypatch.setattr("saezoo_train.backend.why_no_triton", lambda _device: None)
    monkeypatch.setattr("saezoo_train.backend.why_no_launch", lambda _device: None)


def chosen(device=CUDA, **changes):
    return choose_backend(resolve(read_recipe({}, changes)), device)


def test_a_cpu_gets_torch_ops_and_no_warning(caplog):
    found = chosen(torch.device("cpu"))
    assert not found.kernels
    assert found.words == "steps are made by torch ops: the device is cpu, not cuda"
    assert found.kit() is None
    assert not caplog.records


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated"])
def test_a_gpu_gets_kernels_for_each_architecture_that_has_them(architecture):
    found = chosen(architecture=architecture)
    assert found.kernels
    assert found.words == "steps are made by Triton kernels, products in bfloat16"


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "relu"}, "no kernels for architecture relu"),
        ({"architecture": "matryoshka"}, "no kernels for architecture matryoshka"),
        ({"optimiser.clip_norm": 1}, "optimiser.clip_norm"),
        ({"sae.multi_k": 128}, "Multi-TopK"),
        ({"architecture": "jumprelu", "sae.pre_act_coefficient": 0.1}, "sae.pre_act_coefficient"),
        ({"sae.k": 513}, "at most 512 latents a token, sae.k is 513"),
        ({"sae.k_start": 600, "sae.k_steps": 9}, "at most 512 latents a token, sae.k is 600"),
        ({"sae.d_sae": 600_000}, "at most 524,288 latents, sae.d_sae is 600,000"),
        ({"run.triton": False}, "run.triton is false"),
    ],
)
def test_what_the_kernels_do_not_compute_is_left_to_torch(changes, said, caplog):
    found = chosen(**changes)
    assert not found.kernels
    assert said in found.words
    assert not caplog.records
    if changes.get("run.triton", True):
        with pytest.raises(ConfigError, match="run.triton=true, but "):
            chosen(**changes, **{"run.triton": True})


def capability(monkeypatch, major, minor):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "an old one")


def test_a_gpu_that_is_too_old_is_one_warning(monkeypatch, caplog):
    capability(monkeypatch, 7, 5)
    found = chosen()
    assert not found.kernels
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "an old one has compute capability 7.5, below 8.0" in caplog.text


@pytest.mark.parametrize(
    ("version", "said"), [("3.1.0", "triton 3.1.0 is older than 3.3"), ("", "triton ? is older")]
)
def test_a_triton_that_is_too_old_is_one_warning(monkeypatch, caplog, version, said):
    import triton

    capability(monkeypatch, 9, 0)
    assert gpu.why_no_triton(CUDA) is None
    monkeypatch.setattr(triton, "__version__", version)
    assert not chosen().kernels
    assert len(caplog.records) == 1
    assert said in caplog.text


def test_no_triton_is_one_warning(monkeypatch, caplog):
    capability(monkeypatch, 9, 0)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _name: None)
    assert not chosen().kernels
    assert len(caplog.records) == 1
    assert "triton is not installed (pip install 'saezoo[train]', on Linux)" in caplog.text


def test_a_triton_that_cannot_be_imported_is_one_warning(monkeypatch, caplog):
    def fail(_name):
        raise OSError("libcuda.so is missing")

    capability(monkeypatch, 9, 0)
    monkeypatch.setattr(gpu.importlib, "import_module", fail)
    assert not chosen().kernels
    assert len(caplog.records) == 1
    assert "triton cannot be imported (OSError: libcuda.so is missing)" in caplog.text


def test_a_driver_that_cannot_run_what_triton_compiles_is_one_warning(monkeypatch, caplog):
    # here there is no driver at all: the launch itself fails
    monkeypatch.setattr("saezoo_train.backend.why_no_triton", lambda _device: None)
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: torch.zeros(*shape))
    found = chosen()
    assert not found.kernels
    assert len(caplog.records) == 1
    assert "a first kernel failed (RuntimeError: " in caplog.text
    with pytest.raises(ConfigError, match="a first kernel failed"):
        chosen(**{"run.triton": True})


def by_reference(monkeypatch):
    """Updates by the kernels' step, on a CPU, with the functions that the kernels equal."""
    monkeypatch.setattr(Backend, "kit", lambda _self: reference)


class Notes(Watch):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated"])
def test_a_run_of_the_kernels_step_is_the_run_of_torch_ops(
    host, data, architecture, tmp_path, monkeypatch
):
    options = {"d_sae": 48, "dead_after_tokens": 500}
    options |= {"k": 4} if "topk" in architecture else {}
    options |= {"target_l0": 4} if architecture == "jumprelu" else {}
    wanted = recipe(host, data, architecture=architecture, save_dtype="float32")
    # a small eps makes whole steps of gradients that are rounding alone
    wanted["optimiser"] |= {"eps": 1e-4}
    wanted["sae"] = options
    plain = train_sae(wanted, tmp_path / "torch")
    by_reference(monkeypatch)
    done = train_sae(wanted, tmp_path / "kernels")
    assert done.metrics["fvu"] == pytest.approx(plain.metrics["fvu"], rel=0.01)
    assert done.metrics["l0"] == pytest.approx(plain.metrics["l0"], rel=0.01)
    assert load_sae(done.folder).cfg.notes["steps_by"].startswith("Triton kernels")
    assert "steps_by" not in load_sae(plain.folder).cfg.notes


def test_a_run_may_change_who_makes_its_updates(host, data, tmp_path, monkeypatch):
    wanted = recipe(host, data, save_dtype="float32")
    wanted["optimiser"] |= {"eps": 1e-4}
    whole = train_sae(wanted, tmp_path / "whole")

    class StopAt(Notes):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def phase(self, name, *_, **__):
            self.name = name

        def progress(self, done):
            if self.name == "training" and done == self.step * 64:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as kernels:
        by_reference(kernels)
        with pytest.raises(Stopped):
            train_sae(wanted, tmp_path / "both", watch=StopAt(20))
    with pytest.raises(Stopped):
        train_sae(wanted, tmp_path / "both", watch=StopAt(40))
    by_reference(monkeypatch)
    both = train_sae(wanted, tmp_path / "both")
    assert both.resumed_at == 40
    assert both.metrics["fvu"] == pytest.approx(whole.metrics["fvu"], rel=0.01)
    # what differs is rounding, and which of nearly equal latents was chosen
    assert close(load_sae(both.folder).W_dec, load_sae(whole.folder).W_dec, torch.bfloat16)


def test_a_loss_that_is_not_finite_is_told_at_the_next_row(host, data, tmp_path, monkeypatch):
    by_reference(monkeypatch)
    wanted = recipe(host, data, optimiser={"lr": 1e30, "warmup_steps": 0})
    with pytest.raises(TrainingError, match="not finite|exploded"):
        train_sae(wanted, tmp_path / "sae")


def test_no_triton_is_a_flag_and_the_choice_is_a_line(host, data, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(recipe(host, data)))
    with pytest.raises(SystemExit) as done:
        main(["train", str(path), "--no-triton", "--print-config"])
    assert done.value.code in (0, None)
    assert "triton: false" in capsys.readouterr().out
    notes = Notes()
    train_sae(read_recipe(path, {"run.triton": False}), tmp_path / "sae", watch=notes)
    assert "steps are made by torch ops: run.triton is false" in notes.lines
