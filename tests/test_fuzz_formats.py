"""Whatever is broken in a checkpoint, its reader says so in one line, or what it loads is right."""

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saezoo.errors import NotFinite, SaezooError
from saezoo.formats import FORMATS
from saezoo.load import load_sae
from saezoo.numerics import close
from tests.damage import DAMAGES, EXAMPLES, not_finite, scribbled
from tests.origins import ALL
from tests.origins._origin import D

BY_FORMAT = {
    name: origins
    for name in FORMATS
    if (origins := [origin for origin in ALL if origin.format == name])
}


def inputs(width):
    drawn = torch.randn(16, 2 * D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return drawn[:, :width] * 2 + 1


def wide(tensors):
    return {
        key: value.double() if value.is_floating_point() else value
        for key, value in tensors.items()
    }


def outputs(origin, tensors, x):
    """The authors' features and reconstruction; None where their formula does not take these."""
    try:
        return origin.encode(wide(tensors), x), origin.forward(wide(tensors), x)
    except (KeyError, RuntimeError, IndexError, TypeError, ValueError):
        return None


def load(path, origin, named, **options):
    """(the SAE, what was said): one of them."""
    chosen = {"format": origin.format} if named else {}
    try:
        return load_sae(path, dtype=torch.float64, **chosen, **options), None
    except SaezooError as error:
        return None, error


def is_right(sae, origin, tensors):
    """Whether it computes what the authors' formula makes of these tensors."""
    # a transcoder may have lost a column of its input alone: then it is one of that width
    x = inputs(sae.d_in)
    expected = outputs(origin, tensors, x)
    return expected is not None and (
        close(sae.encode(x), expected[0], torch.float32)
        and close(sae(x), expected[1], torch.float32)
    )


@pytest.mark.parametrize("name", BY_FORMAT)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), damage=st.sampled_from(DAMAGES), named=st.booleans())
def test_a_broken_checkpoint_is_refused_in_one_line_or_loads_right(
    name, seed, damage, named, tmp_path_factory
):
    random = Random(seed)
    origin = random.choice(BY_FORMAT[name])
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("broken")
    try:
        broken = damage(origin, folder, tensors, random)
    except (KeyError, AttributeError, TypeError):
        return  # not even the authors' own code could write this
    sae, said = load(broken.path, origin, named, verify=damage is not_finite)
    if said is not None:
        assert "\n" not in str(said)
        assert len(str(said)) > 10
        return
    if damage is scribbled:
        # a letter in a name of no consequence, or a number: shapes are all that can be said
        assert sae.W_enc.shape == (sae.d_in, sae.d_sae)
        return
    assert is_right(sae, origin, broken.tensors) or is_right(sae, origin, tensors)


@pytest.mark.parametrize("origin", ALL, ids=str)
def test_nan_in_what_is_computed_with_is_notfinite(origin, tmp_path):
    tensors = origin.tensors(torch.Generator().manual_seed(0))
    seen = Counter()
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        flat = value.reshape(-1).clone()
        flat[-1] = torch.nan
        path = origin.write(tmp_path / name, tensors | {name: flat.reshape(value.shape)})
        sae, said = load(path, origin, True, verify=True)
        seen[type(said)] += 1
        if sae is not None:
            # training statistics, or a threshold that is not looked at
            assert is_right(sae, origin, tensors), name
    assert seen[NotFinite]
