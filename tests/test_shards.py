"""Stored activations: what was written is read, bitwise; what is not whole is refused."""

import pytest
import torch

from saezoo.config import Site, TokenRule
from saezoo.errors import DataError
from saezoo.shards import ShardIndex, read_index, read_shard, write_index, write_shard

SITE = Site(module="model.layers.1")


def tensors(tokens, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(tokens, dtype=torch.int32)
    return {
        "x": torch.randn(tokens, d, generator=generator).half(),
        "token_ids": ids + 5,
        "positions": ids % 4,
        "documents": ids // 4,
    }


def write(folder, counts):
    shards = tuple(write_shard(folder, n, tensors(c, seed=n)) for n, c in enumerate(counts))
    index = ShardIndex(site=SITE, rule=TokenRule(skip_first=1), d=6, shards=shards, documents=9)
    write_index(folder, index)
    return index


def test_what_was_written_is_read_bitwise(tmp_path):
    index = write(tmp_path, [5, 8])
    assert read_index(tmp_path) == index
    assert index.tokens == 13
    for number in range(2):
        got = read_shard(tmp_path, index, number)
        for key, value in tensors([5, 8][number], seed=number).items():
            assert torch.equal(got[key], value), key


def test_a_shard_that_no_index_names_does_not_count(tmp_path):
    index = write(tmp_path, [5])
    write_shard(tmp_path, 1, tensors(3))
    assert read_index(tmp_path) == index


def test_what_is_not_whole_is_refused_in_one_line(tmp_path):
    index = write(tmp_path, [5])
    for content, said in [
        ("{", "index.json"),
        ('{"saezoo_shards": 2}', "saezoo_shards"),
        (index.model_dump_json().replace("shard-00000", "../x/shard-00000"), "shards.0.name"),
        (index.model_dump_json().replace("shard-00000", "shard-00007"), "not there"),
    ]:
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(DataError, match=said) as caught:
            read_index(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no index\.json"):
        read_index(tmp_path / "absent")


def test_a_shard_that_is_not_what_the_index_says_is_refused(tmp_path):
    index = write(tmp_path, [5])
    write_shard(tmp_path, 0, tensors(4))
    with pytest.raises(DataError, match="the index says"):
        read_shard(tmp_path, index, 0)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read"):
        read_shard(tmp_path, index, 0)
