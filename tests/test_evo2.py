"""tensor_topk, of Goodfire's tied BatchTopK SAEs: what is on is chosen over all tokens of a call,
in whatever pieces they are computed; and one matrix is one.
"""

import pytest
import torch

from saezoo import chunked
from saezoo.config import SAEConfig
from saezoo.entry import Entry
from saezoo.errors import ConfigError, FormatError
from saezoo.formats import evo2 as reader
from saezoo.formats import goodfire
from saezoo.load import load_sae
from saezoo.sae import SAE
from saezoo.save import save_sae
from saezoo.sparse import pack_active
from tests.origins import evo2
from tests.origins._origin import D, K, N

ORIGIN = evo2.ORIGINS[0]


@pytest.fixture
def loaded(tmp_path):
    tensors = ORIGIN.tensors(torch.Generator().manual_seed(0))
    return load_sae(ORIGIN.write(tmp_path, tensors), dtype=torch.float64)


def activations(*lead, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, D, dtype=torch.float64, generator=generator)


PIECES = {
    "one token": 4 * N,
    "7 tokens": 28 * N,
    "5 features": 5 * D,
    "5 features, 12 tokens": 240,
    "one number": 1,
}
"""chunked.NUMBERS by what is computed at a time, as the first test of these has it."""
pieces = pytest.mark.parametrize("numbers", PIECES.values(), ids=PIECES)


@pieces
def test_the_pieces_in_which_it_is_computed_change_nothing(numbers, loaded, monkeypatch):
    x = activations(40)
    whole = loaded.encode_sparse(x)
    monkeypatch.setattr(chunked, "NUMBERS", numbers)
    pieces = loaded.encode_sparse(x)
    assert torch.equal(whole.indices, pieces.indices)
    assert torch.allclose(whole.values, pieces.values, rtol=1e-12)
    assert int(whole.counts.sum()) == K * 40
    assert len(whole.counts.unique()) > 2


def test_the_leading_shape_does_not_matter_but_the_company_does(loaded):
    x = activations(6)
    assert torch.allclose(loaded.encode(x), loaded.encode(x.view(2, 3, D)).view(6, N))
    alone = torch.cat([loaded.encode(row.unsqueeze(0)) for row in x])
    assert (alone != 0).sum(-1).tolist() == [K] * 6
    assert not torch.equal(alone != 0, loaded.encode(x) != 0)


def test_fewer_positive_ones_than_wanted_are_all_there_is(loaded):
    loaded.b_enc.data -= 8
    features = loaded.encode(activations(10))
    assert 0 < int((features > 0).sum()) < 10 * K
    assert not (features < 0).any()


@pytest.mark.parametrize(
    ("rows", "columns"), [(12, 4), (1, 4), (5, 4), (12, 1), (5, 3), (1, 1)], ids=str
)
@pytest.mark.parametrize("largest_last", [False, True])
def test_of_equal_numbers_the_first_places_win(rows, columns, largest_last):
    whole = torch.tensor([1.0, 2.0, 0.0, 2.0]).repeat(12, 1)
    whole[11, 0] = 3.0 if largest_last else 0.0
    parts = chunked.Parts(
        [slice(at, min(at + columns, 4)) for at in range(0, 4, columns)],
        [slice(at, at + rows) for at in range(0, 12, rows)],
    )

    def choose(count):
        values, places = chunked.choose_of_all(
            lambda part: lambda z: (z[:, part], z[:, part]), whole, parts, 4, count
        )
        assert torch.equal(values, whole.flatten()[places])
        return places.tolist()

    assert choose(7) == [1, 3, 5, 7, 9, 11, *([44] if largest_last else [13])]
    assert choose(100) == whole.flatten().nonzero().flatten().tolist()


@pieces
def test_nan_counts_as_largest_as_it_does_for_the_authors(numbers, loaded, monkeypatch):
    tensors = ORIGIN.tensors(torch.Generator().manual_seed(0))
    x = activations(10)
    x[6] = torch.nan
    monkeypatch.setattr(chunked, "NUMBERS", numbers)
    expected = evo2.encode(tensors, x)
    assert expected[6].isnan().all()
    assert 0 < int((expected > 0).sum()) == 10 * K - N
    assert torch.allclose(loaded.encode(x), expected, equal_nan=True)


def test_packing_places_is_packing_the_dense_tensor():
    dense = torch.randn(2, 3, 10) * (torch.rand(2, 3, 10) > 0.7)
    assert torch.equal(pack_active(dense).to_dense(), dense)
    assert pack_active(dense).values.shape[:-1] == (2, 3)


def bytes_of_matrices(sae):
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage()
        for value in (sae.W_enc_rows.data, sae.W_dec.data)
    }
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("origin", [evo2.ORIGINS[0], evo2.ORIGINS[2]], ids=str)
def test_the_tied_matrix_is_in_memory_once_whatever_is_done_to_it(origin, dtype, tmp_path):
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    sae = load_sae(origin.write(tmp_path, tensors), dtype=dtype)
    one = N * D * torch.empty(0, dtype=dtype).element_size()
    for change in (
        lambda: None,
        lambda: sae(activations(5).to(dtype)),
        lambda: sae.to(torch.float64),
        lambda: sae.half(),
        lambda: sae(activations(5).half()),
    ):
        change()
        one = N * D * sae.dtype.itemsize
        assert sae.W_dec.data.is_set_to(sae.W_enc_rows.data)
        assert bytes_of_matrices(sae) < 2 * one
    assert set(dict(sae.named_parameters())) == {"W_enc_rows", "b_enc", "W_dec", "b_dec"}


def test_matrices_of_other_saes_stay_two():
    cfg = SAEConfig(architecture="tensor_topk", d_in=D, d_sae=N, k=K)
    sae = SAE(cfg, device="meta")
    assert sae.to_empty(device="cpu").W_dec.data_ptr() != sae.W_enc_rows.data_ptr()


def test_a_tied_sae_is_saved_and_comes_back_the_same(loaded, tmp_path):
    x = activations(9)
    loaded(x)  # lays the matrix out in rows
    again = load_sae(save_sae(loaded, tmp_path / "saved"))
    assert torch.equal(again(x), loaded(x))
    assert again.cfg == loaded.cfg


def test_k_is_of_the_name_or_of_the_registry_and_of_nothing_else(tmp_path):
    path = ORIGIN.write(tmp_path, ORIGIN.tensors(torch.Generator().manual_seed(0)))
    with pytest.raises(FormatError, match="k is 3, but the registry states 4"):
        reader.read(path, Entry(source=str(path), k=4))
    other = path.rename(tmp_path / "DeepSeek-R1-SAE-l37.pt")
    assert goodfire.read(other, Entry(source=str(other), k=5)).cfg.k == 5
    with pytest.raises(FormatError, match="k is not in the file"):
        goodfire.read(other, None)


def test_a_tensor_topk_without_relu_is_refused():
    with pytest.raises(ConfigError, match="relu_after"):
        SAEConfig.from_json(
            {"architecture": "tensor_topk", "d_in": D, "d_sae": N, "k": K, "relu_after": False}
        )
