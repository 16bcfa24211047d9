"""What training reads: documents of every kind, streams that go on anywhere, a buffer whose order
is a function of the step.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from saezoo_train import read_recipe
from saezoo_train.activations import Chunk, ModelSource, Position, ShardSource
from saezoo_train.buffer import Buffer, BufferPlace
from saezoo_train.config import Data, resolve
from saezoo_train.data import (
    LONGEST_TEXT,
    Words,
    breadth_first,
    documents,
    fingerprint,
    held_out,
    held_out_documents,
    kind_of,
)
from saezoo_train.moments import measure_moments, to_setting
from saezoo_train.stdlib_text import stdlib_documents
from saezoo_train.store import store_pass
from safetensors.torch import save_file

from saezoo.config import Site, TokenRule
from saezoo.errors import DataError
from saezoo.host import load_host
from saezoo.numerics import close
from saezoo.shards import ShardIndex, read_index, read_shard, write_index, write_shard
from tests.tiny_host import recipe, texts, write_host, write_texts

SITE = Site(module="model.layers.0")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return load_host(str(write_host(tmp_path_factory.mktemp("host"))))


def data(dataset, **more):
    return Data.model_validate({"dataset": str(dataset)} | more)


def test_the_standard_library_is_text_in_an_order_of_its_own():
    found = list(itertools.islice(stdlib_documents(), 60))
    assert found == list(itertools.islice(stdlib_documents(), 60))
    assert sum(map(len, found)) > 50_000
    assert kind_of(Data()) == "stdlib"


def test_a_long_document_is_taken_in_parts_that_lose_nothing(tmp_path):
    book = "\n".join(f"line {number} " + "x" * 50 for number in range(3000)) + "\n"
    (tmp_path / "book.txt").write_text(book)
    parts = list(documents(data(tmp_path / "book.txt")))
    assert len(parts) > 5
    assert "".join(parts) == book
    assert all(len(part) <= LONGEST_TEXT and part.endswith("\n") for part in parts)
    (tmp_path / "one.txt").write_text("y" * 50_000)
    assert "".join(documents(data(tmp_path / "one.txt"))) == "y" * 50_000


def write_tokens(folder, arrays, **facts):
    folder.mkdir()
    for name, ids in arrays.items():
        if name.endswith(".npy"):
            np.save(folder / name, ids)
        else:
            save_file({"ids": torch.from_numpy(ids)}, folder / name)
    index = {"saezoo_tokens": 1, "shards": list(arrays)} | facts
    (folder / "tokens.json").write_text(json.dumps(index))
    return folder


def test_token_shards_are_rows_or_runs_between_separators(tmp_path):
    arrays = {
        "a.npy": np.array([[5, 6, 7], [8, 9, 5]], dtype=np.uint16),
        "b.safetensors": np.array([5, 6, 0, 7, 0, 0, 8], dtype=np.int32),
    }
    folder = write_tokens(tmp_path / "tokens", arrays, separator=0)
    assert kind_of(data(folder)) == "tokens"
    assert list(documents(data(folder))) == [[5, 6, 7], [8, 9, 5], [5, 6], [7], [8]]


WRONG_TOKENS = [
    ({"a.npy": np.zeros((2, 2, 2), np.int64)}, {}, "token ids are integers"),
    ({"a.npy": np.zeros(3)}, {}, "token ids are integers"),
    ({"a.npy": np.array([{}], dtype=object)}, {}, "cannot be read"),
    ({}, {"shards": ["../x.npy"]}, "is no file beside it"),
    ({}, {"shards": ["x.npy"]}, "is no file beside it"),
    ({}, {"saezoo_tokens": 2}, "saezoo_tokens"),
]


@pytest.mark.parametrize(("arrays", "facts", "said"), WRONG_TOKENS, ids=lambda v: str(v)[:20])
def test_token_shards_that_are_wrong_are_refused_in_one_line(arrays, facts, said, tmp_path):
    folder = write_tokens(tmp_path / "tokens", arrays, **facts)
    with pytest.raises(DataError, match=said) as caught:
        list(documents(data(folder)))
    assert "\n" not in str(caught.value)


def test_tokens_of_another_tokenizer_are_refused(host):
    words = Words(host.tokenizer, 62)
    assert words([61, 5])["input_ids"] == [61, 5]
    with pytest.raises(DataError, match="the model has 62 tokens"):
        words([5, 62])


def test_text_and_its_tokens_give_the_same_activations(host, tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", 30)
    rows = np.array([host.tokenizer(text)["input_ids"] for text in texts(30)])
    folder = write_tokens(tmp_path / "tokens", {"a.npy": rows})
    ours, theirs = (
        torch.cat([chunk.x for chunk in source_of(host, name).one_pass(Position())]).sum(0)
        for name in (path, folder)
    )
    # which are held out is decided by what a document is, so that only their size is compared
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    assert theirs.isfinite().all()


def test_a_document_is_held_out_by_its_content_alone():
    made = [f"document {number}" for number in range(4000)]
    share = sum(map(held_out, made)) / len(made)
    assert 0.03 < share < 0.07
    assert [held_out(text) for text in made] == [held_out(text) for text in made]
    assert [held_out([1, number]) for number in range(99)] == [
        held_out([1, number]) for number in range(99)
    ]


def test_held_out_documents_are_those_that_training_leaves_out(host, tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", 100)
    out = held_out_documents(data(path))
    assert 0 < len(out) < 20
    assert out == [text for text in texts(100) if held_out(text)]
    other = write_texts(tmp_path / "other.jsonl", 7, seed=1)
    assert len(held_out_documents(data(path, measure_on=str(other)))) == 7
    kept = source_of(host, path)
    read = sum(len(chunk.x) for chunk in kept.one_pass(Position()))
    # 40 words in contexts of 32: the second has 8 and is left out; position 0 is
    assert read == (100 - len(out)) * 31


def test_what_local_data_is_tells_a_change(tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", 3)
    before = fingerprint(data(path))
    assert fingerprint(data(path)) == before
    write_texts(path, 4)
    assert fingerprint(data(path)) != before
    assert fingerprint(data("HuggingFaceFW/fineweb")) == {}


class Numbers:
    """A tokenizer of one token a number."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True):  # noqa: ARG002 the real ones' signature
        return {"input_ids": [int(word) for word in text.split()]}


def test_one_context_of_every_document_comes_before_a_second_of_any():
    made = [
        " ".join(str(100 * number + place) for place in range(8 * (number + 1)))
        for number in range(5)
    ]
    rule = TokenRule(context=8)
    pieces = list(breadth_first(Numbers(), made, rule, "seed"))
    assert sorted(number for number, _ in pieces[:5]) == [0, 1, 2, 3, 4]
    assert sorted(number for number, _ in pieces[5:9]) == [1, 2, 3, 4]
    assert sorted(token for _, piece in pieces for token in piece) == sorted(
        int(word) for text in made for word in text.split()
    )
    assert pieces != list(breadth_first(Numbers(), made, rule, "another"))
    with_bos = breadth_first(Numbers(), made, TokenRule(context=8, prepend_bos=True), "seed")
    assert all(piece[0] == 0 for _, piece in with_bos)


def source_of(host, dataset, **changes):
    made = resolve(read_recipe(recipe("x", dataset, **changes)))
    return ModelSource(made, SITE, host.model, host.tokenizer)


def test_a_stream_goes_on_bitwise_from_the_beginning_of_any_chunk(host, tmp_path, monkeypatch):
    monkeypatch.setattr("saezoo_train.data.WINDOW_DOCUMENTS", 17)
    path = write_texts(tmp_path / "docs.jsonl", 40)
    source = source_of(host, path, data={"tokens": 700})
    whole = list(itertools.islice(source.chunks(Position()), 22))
    assert whole[-1].after.epoch >= 2
    assert {chunk.after.document for chunk in whole} == {0, 17}
    firsts = [chunk.x for chunk in whole if chunk.after.chunk == 1 and not chunk.after.document]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(firsts))
    for number in range(21):
        follows = next(source.chunks(whole[number].after))
        assert torch.equal(follows.x, whole[number + 1].x), number
        assert follows.after == whole[number + 1].after
    ends = [
        before.after
        for before, chunk in itertools.pairwise(whole)
        if chunk.after.epoch > before.after.epoch
    ]
    assert [end.tokens for end in ends] == [700] * len(ends)


def test_a_dataset_that_is_empty_or_too_small_says_how_many_tokens_there_were(host, tmp_path):
    path = write_texts(tmp_path / "docs.jsonl", 2)
    with pytest.raises(DataError, match=r"gave 62 activations, and a batch is 64"):
        list(itertools.islice(source_of(host, path).chunks(Position()), 9))
    path.write_text("\n")
    with pytest.raises(DataError, match="gave 0 activations"):
        next(source_of(host, path).chunks(Position()))


def stored(folder, sizes=(5000, 3000), d=3):
    """Shards whose rows all differ, of documents of 40 tokens."""
    shards, first = [], 0
    for number, size in enumerate(sizes):
        rows = torch.arange(first, first + size)
        tensors = {
            "x": torch.stack([rows.float(), *[torch.zeros(size)] * (d - 1)], 1),
            "token_ids": rows.int(),
            "positions": rows.int() % 40,
            "documents": rows.int() // 40,
        }
        shards.append(write_shard(folder, number, tensors))
        first += size
    index = ShardIndex(
        site=SITE, rule=TokenRule(), d=d, dtype="float32", shards=tuple(shards), documents=first
    )
    write_index(folder, index)
    return folder


def shard_source(folder, hold_out=False, **changes):
    made = resolve(read_recipe(recipe("x", folder, **changes)))
    return ShardSource(made, folder, hold_out=hold_out)


def test_shards_give_every_row_once_a_pass_in_another_order_each_pass(tmp_path):
    source = shard_source(stored(tmp_path / "acts"))
    chunks = list(itertools.takewhile(lambda c: c.after.epoch < 2, source.chunks(Position())))
    passes = [torch.cat([c.x[:, 0] for c in chunks if c.after.epoch == epoch]) for epoch in (0, 1)]
    for rows in passes:
        assert torch.equal(rows.sort().values, torch.arange(8000.0))
    assert not torch.equal(*passes)
    for number in range(len(chunks) - 1):
        assert torch.equal(next(source.chunks(chunks[number].after)).x, chunks[number + 1].x)


def test_shards_without_text_hold_whole_documents_out(tmp_path):
    source = shard_source(stored(tmp_path / "acts"), hold_out=True)
    out = torch.cat([x[:, 0] for x in source.held_out()])
    one_pass = itertools.takewhile(lambda c: not c.after.epoch, source.chunks(Position()))
    kept = torch.cat([c.x[:, 0] for c in one_pass])
    assert 0 < len(out) < 1000
    assert torch.equal(torch.cat([out, kept]).sort().values, torch.arange(8000.0))
    assert not set((out // 40).tolist()) & set((kept // 40).tolist())


class Counted:
    """A source of rows 0, 1, 2 … in uneven chunks, every 50th an outlier, which counts them."""

    what = "rows"

    def __init__(self):
        self.read = 0

    def chunks(self, start):
        row = start.tokens
        for number in itertools.count(start.chunk):
            size = 5 + number % 7
            rows = torch.arange(row, row + size).float()
            row += size
            self.read = row
            yield Chunk(
                torch.stack([rows, torch.where(rows % 50 == 0, 1e6, 0.0)], 1),
                Position(chunk=number + 1, tokens=row),
            )


def buffer(source=None, place=None, batches=23, tokens=64, seed=0):
    return Buffer(
        source or Counted(),
        batch=16,
        batches=batches,
        tokens=tokens,
        max_norm=1e5,
        dtype=torch.float32,
        seed=seed,
        place=place,
    )


def test_a_buffer_hands_out_every_kept_row_once_in_shuffled_blocks():
    made = buffer()
    batches = [made.next()[:, 0] for _ in range(23)]
    rows = torch.cat(batches)
    kept = torch.tensor([row for row in range(9999) if row % 50][: len(rows)]).float()
    assert torch.equal(rows.sort().values, kept)
    for start in range(0, len(rows) - 63, 64):
        block = rows[start : start + 64]
        assert torch.equal(block.sort().values, kept[start : start + 64])
        assert not torch.equal(block, kept[start : start + 64])
    orders = [block.argsort().tolist() for block in rows[:320].split(64)]
    assert len(set(map(tuple, orders))) == 5


def test_a_buffer_goes_on_from_any_step_and_depends_on_the_seed_alone():
    made = buffer()
    places, batches = [], []
    for _ in range(23):
        places.append(BufferPlace.model_validate(json.loads(made.place.model_dump_json())))
        batches.append(made.next())
    for number, place in enumerate(places):
        again = buffer(place=place)
        for expected in batches[number : number + 6]:
            assert torch.equal(again.next(), expected), number
    other = buffer(seed=1)
    assert not torch.equal(other.next(), batches[0])


def test_a_buffer_is_filled_while_it_is_used_and_never_for_nothing():
    source = Counted()
    made = buffer(source)
    read = []
    for _ in range(23):
        made.next()
        read.append(source.read)
    # two blocks of 64 at most are ahead, and each step brings about a batch
    assert all(seen <= 16 * step + 64 + 32 for step, seen in enumerate(read, 1))
    assert all(0 < after - before <= 32 for before, after in itertools.pairwise(read[:18]))
    assert read[-1] <= 23 * 16 * 51 // 50 + 16


def test_a_value_that_has_no_place_in_the_buffers_dtype_is_named():
    class Large(Counted):
        def chunks(self, start):
            yield Chunk(torch.full((64, 2), 70_000.0), start)

    half = Buffer(
        Large(), batch=16, batches=1, tokens=16, max_norm=1e9, dtype=torch.float16, seed=0
    )
    with pytest.raises(DataError, match=r"70000 does not fit .*buffer\.dtype=float32"):
        half.next()


def test_moments_leave_outliers_out_of_mean_and_variance():
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)) + 2
    x[:7] *= 1000
    made = measure_moments(x, 5.0, None, 0)
    norms = x.norm(dim=1)
    kept = x[norms <= 5 * norms.median()].double()
    assert (made.tokens, made.outliers) == (len(kept), 7)
    assert made.median_norm == float(norms.median())
    assert close(made.mean_D, kept.mean(0).float())
    spread = float((kept - kept.mean(0)).square().sum(1).mean())
    assert made.variance == pytest.approx(spread, rel=1e-9)
    assert made.mean_norm == pytest.approx(float(kept.norm(dim=1).mean()), rel=1e-6)
    setting = to_setting(made, resolve(read_recipe({})))
    assert float(setting.sample_SD.norm(dim=1).mean()) == pytest.approx(1, rel=1e-5)
    assert setting.variance == pytest.approx(spread / made.mean_norm**2)


class Enough(Exception):
    """The store is stopped."""


def test_a_store_that_is_stopped_goes_on_to_the_same_shards(host, tmp_path, monkeypatch):
    monkeypatch.setattr("saezoo_train.store.SHARD", 300)
    source = source_of(host, write_texts(tmp_path / "docs.jsonl", 60), data={"tokens": 1500})
    whole = store_pass(source, tmp_path / "whole")

    def stop(done):
        if done > 800:
            raise Enough

    with pytest.raises(Enough):
        store_pass(source, tmp_path / "parts", progress=stop)
    assert 300 <= read_index(tmp_path / "parts").tokens < 800
    parts = store_pass(source, tmp_path / "parts")
    assert parts == whole
    assert parts.complete
    assert parts.tokens == 1500
    for number in range(len(whole.shards)):
        ours, theirs = (read_shard(tmp_path / n, whole, number) for n in ("whole", "parts"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    documents_there = read_shard(tmp_path / "whole", whole, 0)["documents"]
    assert len(documents_there.unique()) > 5


def test_a_store_of_other_data_is_refused_unless_it_may_be_replaced(host, tmp_path):
    one = source_of(host, write_texts(tmp_path / "a.jsonl", 30))
    other = source_of(host, write_texts(tmp_path / "b.jsonl", 40, seed=2))
    store_pass(one, tmp_path / "acts")
    with pytest.raises(DataError, match="holds the activations of other data"):
        store_pass(other, tmp_path / "acts")
    assert store_pass(other, tmp_path / "acts", replace=True).tokens > 900
