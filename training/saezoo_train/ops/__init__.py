"""A training step through torch ops, on a CPU or any other device: the parts, which faster kernels
may replace one by one.

    select    the dense product of the encoder, piece by piece, and which of its values are kept
    active    the pairs of token and latent that are on, by token and by latent
    products  decode, gradients of the pairs, gradients of the weights: plain functions
    autograd  the same as differentiable functions
    rows      what is done to whole rows of the decoder
"""

from saezoo_train.ops.active import Active, ByLatent
from saezoo_train.ops.autograd import at_latents, decode_at, encode_at
from saezoo_train.ops.products import decode, latent_sums, pair_products, weight_gradient
from saezoo_train.ops.rows import normalise_rows, remove_parallel_gradient
from saezoo_train.ops.select import (
    pre_activations,
    select_above,
    select_batch_top_k,
    select_top_k,
)

__all__ = [
    "Active",
    "ByLatent",
    "at_latents",
    "decode",
    "decode_at",
    "encode_at",
    "latent_sums",
    "normalise_rows",
    "pair_products",
    "pre_activations",
    "remove_parallel_gradient",
    "select_above",
    "select_batch_top_k",
    "select_top_k",
    "weight_gradient",
]
