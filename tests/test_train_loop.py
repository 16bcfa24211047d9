"""The loop and what comes out of it: rows, schedule, display, curves, and a folder that load_sae
opens, for every architecture.
"""

import io
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from saezoo_train import Watch, train_sae
from saezoo_train.activations import Chunk, Source
from saezoo_train.architectures import ARCHITECTURES
from saezoo_train.display import Clock, Lines, Panel, duration, sparkline
from saezoo_train.dry import _read_some
from saezoo_train.metrics_log import MetricsLog, read_rows
from saezoo_train.optimiser import adam_tensors, load_adam, rate_at
from saezoo_train.plot import plot_run

from saezoo.check import GOLDEN_TOKENS, check_sae, decided_tokens
from saezoo.config import SAEConfig, Site, TokenRule
from saezoo.errors import ConfigError, DataError
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.sae import SAE
from saezoo.shards import ShardIndex, read_index, read_shard, write_index, write_shard
from tests.tiny_host import recipe, write_host, write_texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return write_host(tmp_path_factory.mktemp("host"))


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "docs.jsonl", 60)


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (75, 1.0), (90, 0.4), (99, 0.04)]
)
def test_the_learning_rate_rises_stays_and_falls_to_zero(step, share):
    assert rate_at(step, 100, 10, 0.25) == pytest.approx(share)
    assert rate_at(step, 100, 0, 0.0) == 1.0


def test_what_adam_holds_can_be_put_back():
    def step(model, adam, x):
        adam.zero_grad()
        model(x).square().sum().backward()
        adam.step()

    one = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(one.parameters(), fused=True)
    step(one, adam, torch.ones(1, 3))
    two = torch.nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    again = torch.optim.Adam(two.parameters(), fused=True)
    load_adam(two, again, {key: value.clone() for key, value in adam_tensors(one, adam).items()})
    x = torch.tensor([[1.0, -2.0, 3.0]])
    step(one, adam, x)
    step(two, again, x)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_what_is_trained_is_a_folder_that_load_sae_opens(host, data, name, tmp_path):
    options = {"d_sae": 48, "dead_after_tokens": 2000}
    fields = ARCHITECTURES[name].Options.model_fields
    options |= {"k": 4} if "k" in fields else {}
    options |= {"target_l0": 4} if "target_l0" in fields else {}
    chosen = recipe(host, data, architecture=name, train_tokens=64 * 100)
    done = train_sae(chosen | {"sae": options}, tmp_path / "sae")
    sae = load_sae(done.folder)
    assert all(finding.ok is not False for finding in check_sae(done.folder)), check_sae(
        done.folder
    )
    assert {"golden.safetensors", "stats.safetensors", "README.md"} <= {
        item.name for item in done.folder.iterdir()
    }
    facts = sae.cfg.metrics
    assert facts == done.metrics
    assert 0 < facts["fvu"] < 1
    assert facts["held_out_documents"] > 0
    assert facts["training_tokens"] == 6400
    assert (sae.cfg.site.module, sae.cfg.site.hook_name) == (
        "model.layers.0",
        "blocks.0.hook_resid_post",
    )
    assert sae.cfg.tokens.median_norm > 0
    assert f"trained as {name}" in (done.folder / "README.md").read_text() or (
        sae.cfg.architecture == name
    )


@pytest.mark.parametrize("name", ["SquaredSAE", "ShiftedSAE"])
def test_an_architecture_of_ones_own_is_trained_measured_and_loaded(
    host, data, name, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "copied_sae", raising=False)
    example = Path(__file__).parent.parent / "docs" / "examples" / "my_sae.py"
    (tmp_path / "copied_sae.py").write_text(example.read_text())
    chosen = recipe(host, data, architecture=f"copied_sae:{name}", sae=None)
    chosen["sae"] = {"d_sae": 48}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(chosen))
    done = train_sae(tmp_path / "mine.yaml", tmp_path / "sae")
    assert 0 < done.metrics["fvu"] < 1
    assert done.metrics["l0"] > 0
    if name == "ShiftedSAE":
        assert load_sae(done.folder).cfg.architecture == "relu"
        return
    with pytest.raises(ConfigError, match="imports nothing that a file names"):
        load_sae(done.folder)
    sae = load_sae(done.folder, custom=sys.modules["copied_sae"].SquaredSAE)
    assert sae(torch.randn(3, 12)).shape == (3, 12)


def test_rows_are_means_over_their_steps(host, data, tmp_path):
    rows = []

    class See(Watch):
        def row(self, row):
            rows.append(row)

    done = train_sae(recipe(host, data, save_dtype="float32"), tmp_path / "sae", watch=See())
    assert rows == read_rows(tmp_path / "sae.run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["fvu"] < 0.5 * rows[0]["fvu"]
    assert all(row["l0"] == 4 for row in rows)
    assert rows[1]["lr"] == 3e-3
    assert rows[-1]["lr"] == pytest.approx(3e-3 / 30)
    assert done.metrics["fvu"] == pytest.approx(rows[-1]["fvu"], rel=0.5)
    last = train_sae(
        recipe(host, data, save_dtype="float32", run={"log_every": 1}), tmp_path / "each"
    )
    every = read_rows(last.folder.with_name("each.run") / "metrics.jsonl")
    assert rows[0]["fvu"] == pytest.approx(sum(row["fvu"] for row in every[:10]) / 10)


def write_shards(folder, tokens=3000, d=8):
    """Sparse sums of 12 directions, with a mean and two outliers."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, d, generator=generator)
    on = (torch.rand(tokens, 12, generator=generator) < 0.1).float()
    x = (on * torch.rand(tokens, 12, generator=generator) * 5) @ directions + 3
    x[:2] *= 1000
    ids = torch.arange(tokens, dtype=torch.int32)
    tensors = {"x": x.half(), "token_ids": ids, "positions": ids % 20, "documents": ids // 20}
    shard = write_shard(folder, 0, tensors)
    site = Site(model="tiny", layer=3, module="model.layers.3")
    index = ShardIndex(site=site, rule=TokenRule(skip_first=1), d=d, shards=(shard,))
    write_index(folder, index)
    return folder


def test_activation_shards_need_no_language_model_and_say_the_site(tmp_path):
    acts = write_shards(tmp_path / "acts")
    chosen = recipe("x", acts, train_tokens=64 * 400)
    del chosen["site"], chosen["tokens"]
    done = train_sae(chosen, tmp_path / "sae")
    sae = load_sae(done.folder)
    assert sae.cfg.site.module == "model.layers.3"
    assert sae.cfg.tokens.skip_first == 1
    assert done.metrics["fvu"] < 0.25
    assert "loss_recovered" not in done.metrics
    # inputs were scaled in training: the folder reads raw activations, and does as well on them
    x = read_shard(acts, read_index(acts), 0)["x"][2:].float()
    fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    last = read_rows(tmp_path / "sae.run" / "metrics.jsonl")[-1]
    assert fvu == pytest.approx(last["fvu"], rel=0.1)
    for change, said in [
        (
            {"site.model": "tiny", "site.layer": 2},
            "holds activations of layer 3, but the recipe says site.layer=2",
        ),
        ({"site.layer": 3}, "holds activations of model tiny, but the recipe says site.model="),
        ({"tokens.skip_first": 2}, "was made with skip_first 1"),
    ]:
        with pytest.raises(DataError, match=said):
            train_sae(chosen, tmp_path / "other", changes=change)


def test_golden_inputs_are_those_that_rounding_cannot_tip():
    torch.manual_seed(0)
    sae = SAE(SAEConfig(architecture="topk", d_in=6, d_sae=40, k=3))
    for value in sae.parameters():
        torch.nn.init.normal_(value)
    x = torch.randn(600, 6)
    near = decided_tokens(sae, x)
    assert GOLDEN_TOKENS <= len(near) < 600
    on = sae.encode(near) != 0
    assert torch.equal(sae.encode(near * (1 + 1e-5)) != 0, on)


def test_a_row_that_was_cut_off_is_dropped_and_later_ones_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"ste')
    log = MetricsLog(tmp_path, 20)
    log.add({"step": 30, "fvu": 0.5})
    assert read_rows(path) == [{"step": 10}, {"step": 20}, {"step": 30, "fvu": 0.5}]
    path.write_text('{"step": 10}\nnonsense\n{"step": 20}\n')
    with pytest.raises(DataError, match="line 2"):
        read_rows(path)


def test_wandb_is_imported_only_when_asked_and_gets_every_row(host, data, tmp_path, monkeypatch):
    got: list = []

    class Run:
        def log(self, values, step):
            got.append((step, values))

        def finish(self):
            got.append("finished")

    def init(**settings):
        got.append(settings)
        return Run()

    train_sae(recipe(host, data), tmp_path / "without")
    assert "wandb" not in sys.modules
    module = types.ModuleType("wandb")
    module.init = init
    module.__spec__ = types.SimpleNamespace(name="wandb", loader=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    train_sae(recipe(host, data), tmp_path / "with", changes={"run.logger": "wandb"})
    assert got[0]["config"]["sae"]["k"] == 4
    assert got[0]["resume"] == "allow"
    assert [step for step, _ in got[1:-1]] == [10, 20, 30, 40, 50, 60]
    assert {"fvu", "l0", "dead", "lr"} <= got[1][1].keys()
    assert got[-1] == "finished"


def test_a_sparkline_is_means_from_lowest_to_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([32.0, 31.99]) == "▁▁"  # a thousandth is no curve
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert sparkline([]) == ""


@pytest.mark.parametrize(("seconds", "words"), [(3.4, "0:03"), (62, "1:02"), (11_045, "3:04:05")])
def test_times_are_written_for_people(seconds, words):
    assert duration(seconds) == words


def test_a_clock_knows_speed_and_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("saezoo_train.display.time.monotonic", lambda: now[0])
    clock = Clock(1000, 0)
    assert clock.left is None
    # a model's first call takes long, and is no measure of the rest
    now[0] = 60.0
    clock.move(100)
    assert (clock.speed, clock.left) == (0, None)
    for second in range(1, 5):
        now[0] = 60.0 + second
        clock.move(100 + 100 * second)
        assert clock.speed == pytest.approx(100)
    assert clock.left == pytest.approx(5)


def test_a_dry_run_does_not_take_a_models_first_call_for_its_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("saezoo_train.dry.time.monotonic", lambda: now[0])

    class Slow(Source):
        def __init__(self, seconds):
            self.seconds = seconds

        def chunks(self, start):
            for each in self.seconds:
                now[0] += each
                yield Chunk(torch.ones(100, 4), start)

    recipe = SimpleNamespace(batch=200)
    x_SD, speed = _read_some(Slow([60, 1, 1]), recipe)
    assert (len(x_SD), speed) == (200, 100)
    assert _read_some(Slow([50]), recipe)[1] == 2


ROW = {
    "step": 50, "tokens": 51200, "loss": 0.5, "fvu": 0.25, "l0": 32.0, "dead": 0.125,
    "lr": 5e-4, "tokens_per_second": 9800.0, "seconds": 5.0,
}  # fmt: skip


def test_the_panel_shows_what_a_person_wants_to_know():
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    panel = Panel(screen, "my-sae")
    try:
        panel.phase("training", 1_000_000)
        panel.row(ROW)
        panel.row(ROW | {"fvu": 0.125})
        panel.progress(51_200)
        plain = Console(file=io.StringIO(), width=100)
        plain.print(panel.draw())
    finally:
        panel.close()
    shown = plain.file.getvalue()
    for said in (
        "my-sae",
        "51,200 of 1,000,000 tokens",
        "0.1250",
        "32.0",
        "12.5%",
        "5.0e-04",
        "█▁",
    ):
        assert said in shown, said


def test_without_a_terminal_there_is_a_line_every_few_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("saezoo_train.display.time.monotonic", lambda: now[0])
    out = Console(file=io.StringIO(), width=120)
    lines = Lines(out)
    lines.phase("training", 100_000)
    for second in range(20):
        now[0] = float(second)
        lines.progress(second * 1000)
        lines.row(ROW | {"step": second})
    said = out.file.getvalue().splitlines()
    assert len(said) == 4
    assert "FVU 0.2500  L0 32.0  dead 12.5%  lr 5.0e-04  9,800 tokens/s" in said[-1]
    assert "left" in said[-1]


def test_curves_are_a_png_of_every_number(host, data, tmp_path):
    done = train_sae(recipe(host, data), tmp_path / "sae")
    for folder in (done.folder, tmp_path / "sae.run", tmp_path / "sae.run" / "metrics.jsonl"):
        path = plot_run(folder)
        assert path == tmp_path / "sae.run" / "curves.png"
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        path.unlink()
    assert plot_run(done.folder, tmp_path / "x.png").stat().st_size > 20_000
    with pytest.raises(DataError, match="no metrics of a run"):
        plot_run(tmp_path)
    (tmp_path / "sae.run" / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(DataError, match="has 1 rows"):
        plot_run(done.folder)


def test_training_repeats_bitwise_and_leaves_the_callers_random_numbers_alone(host, data, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    chosen = recipe(host, data, save_dtype="float32")
    one, two = (load_sae(train_sae(chosen, tmp_path / name).folder) for name in "ab")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.W_dec, two.W_dec)
    x = torch.randn(5, 12)
    assert close(one(x), two(x))
