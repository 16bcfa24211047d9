"""cache-activations: shards that hold what the model had, as many as were asked for, and the same
bytes when a run was interrupted and went on.
"""

import json

import pytest
import torch

from saezoo import cache_activations as module
from saezoo.cache_activations import plan_cache, write_cache
from saezoo.capture import activations, capture
from saezoo.cli import main
from saezoo.config import Site, TokenRule
from saezoo.errors import CaptureError, DataError
from saezoo.numerics import close
from saezoo.shards import read_index, read_shard
from tests.hosts import D, make_host
from tests.test_capture import Tokenizer

SITE, RULE = Site(layer=1, point="resid_post"), TokenRule(skip_first=1, context=6)
DOCUMENTS = [" ".join(str(3 + (n * 7 + i) % 37) for i in range(4 + n % 9)) for n in range(30)]


@pytest.fixture(scope="module")
def llama():
    return make_host("llama")


def plan(model, folder, tokens=120, **options):
    options = {"batch_size": 4, "shard_tokens": 40, "dtype": "float32"} | options
    return plan_cache(
        model, options.pop("site", SITE), options.pop("rule", RULE), folder, tokens, **options
    )


def write(model, folder, tokens=120, documents=DOCUMENTS, **options):
    planned = plan(model, folder, tokens, **options)
    return write_cache(model, Tokenizer(), documents, folder, planned)


def read(folder):
    index = read_index(folder)
    shards = [read_shard(folder, index, number) for number in range(len(index.shards))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def test_shards_hold_what_the_model_has_at_each_token_in_reading_order(llama, tmp_path):
    index = write(llama, tmp_path / "a", tokens=10_000)
    got = read(tmp_path / "a")
    assert index.complete
    assert (index.documents, index.d, index.tokens) == (30, D, len(got["x"]))
    assert len(index.shards) > 2
    wanted = list(activations(llama, Tokenizer(), DOCUMENTS, SITE, rule=RULE, batch_size=1))
    assert close(got["x"], torch.cat([batch.x for batch in wanted]))
    for key in ("token_ids", "positions", "documents"):
        assert got[key].tolist() == torch.cat([getattr(batch, key) for batch in wanted]).tolist()
    assert index.dropped["first"] + index.tokens == sum(len(text.split()) for text in DOCUMENTS)


@pytest.mark.parametrize("tokens", [1, 39, 40, 41, 120])
def test_as_many_tokens_are_kept_as_were_asked_for(llama, tmp_path, tokens):
    index = write(llama, tmp_path, tokens)
    assert index.tokens == tokens
    assert index.complete


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 5, 8])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(llama, tmp_path, monkeypatch, after):
    write(llama, tmp_path / "whole")
    calls = 0

    def broken(*args, **options):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Interrupted
        return original(*args, **options)

    original = module.capture_pieces
    with monkeypatch.context() as patched:
        patched.setattr(module, "capture_pieces", broken)
        with pytest.raises(Interrupted):
            write(llama, tmp_path / "again")
    part = read_index(tmp_path / "again")
    assert not part.complete
    seen = []
    planned = plan(llama, tmp_path / "again")
    assert planned.index == part
    write_cache(llama, Tokenizer(), DOCUMENTS, tmp_path / "again", planned, progress=seen.append)
    whole, again = (sorted((tmp_path / name).iterdir()) for name in ("whole", "again"))
    assert [path.name for path in again] == [path.name for path in whole]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in whole]
    assert seen[0] > part.tokens


def test_a_run_that_is_done_does_nothing_and_another_one_is_refused(llama, tmp_path):
    index = write(llama, tmp_path / "a", facts={"model": "tiny"})
    again = plan(llama, tmp_path / "a", facts={"model": "tiny"})
    assert again.needed == 0
    assert write_cache(llama, Tokenizer(), iter(()), tmp_path / "a", again) == index
    for options, said in (
        ({"facts": {"model": "other"}}, "model is tiny, not other"),
        ({"tokens": 7}, "tokens is 120, not 7"),
        ({"dtype": "float16"}, "dtype is float32, not float16"),
        ({"rule": TokenRule(context=6)}, "its rule is"),
        ({"site": Site(layer=0, point="resid_post")}, "its site is"),
    ):
        with pytest.raises(DataError, match=f"another run: .*{said}|{said}"):
            plan(llama, tmp_path / "a", **({"facts": {"model": "tiny"}} | options))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "photo.jpg").touch()
    with pytest.raises(DataError, match="not empty and holds no activations"):
        plan(llama, tmp_path / "b")


def test_the_disk_it_needs_is_known_before_and_enough(llama, tmp_path, monkeypatch):
    planned = plan(llama, tmp_path / "a")
    write_cache(llama, Tokenizer(), DOCUMENTS, tmp_path / "a", planned)
    used = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert used <= planned.needed < used + 2**16
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DataError, match=r"needed for 120 tokens, and the disk has 10,000"):
        plan(llama, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_stored_or_counted_is_refused(llama, tmp_path):
    model = make_host("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 1e7
    with pytest.raises(DataError, match="do not fit float16: write bfloat16 or float32"):
        write(model, tmp_path / "a", dtype="float16")
    model.model.layers[1].mlp.down_proj.weight.data *= float("nan")
    with pytest.raises(CaptureError, match="NaN or infinity"):
        write(model, tmp_path / "b")
    with pytest.raises(DataError, match="no text"):
        write(llama, tmp_path / "c", documents=[])
    assert not (tmp_path / "c").exists()
    with pytest.raises(CaptureError, match=r"no token counts under the rule: 0 of \d+ tokens kept"):
        write(llama, tmp_path / "d", rule=TokenRule(skip_first=9, context=6))
    with pytest.raises(CaptureError, match="no layer 8"):
        plan(llama, tmp_path / "e", site=Site(layer=8, point="resid_post"))


@pytest.mark.real
def test_the_command_shows_the_disk_writes_and_goes_on(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "\n".join(json.dumps({"text": f"The {n}th day was long. " * 9}) for n in range(8))
    )
    command = ["cache-activations", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    command += ["--layer", "15", "--dataset", str(texts), "--out", str(tmp_path / "acts")]
    command += ["--tokens", "100", "--shard", "40", "--context", "32"]
    for told in ("free", "nothing is left to do"):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--json"])
        assert not caught.value.code
        said = capsys.readouterr()
        assert told in said.err
        facts = json.loads(said.out)
        assert (facts["tokens"], facts["d"], facts["complete"]) == (100, 576, True)
    index = read_index(tmp_path / "acts")
    assert index.site.layer == 15
    for wrong, words in (
        (["--sae", "x"], "give --sae, or --layer"),
        (["--site", "model.layers.3"], "has its own"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, *wrong])
        assert caught.value.code == 1
        assert words in capsys.readouterr().err


def test_a_stored_token_is_the_models_own(llama, tmp_path):
    write(llama, tmp_path, tokens=20)
    got = read(tmp_path)
    ids = torch.tensor([[int(word) for word in DOCUMENTS[0].split()]])
    x = capture(llama, SITE, ids)[0, 1:]
    assert close(got["x"][: len(x)], x)
