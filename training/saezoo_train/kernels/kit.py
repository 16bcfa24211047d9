"""All kernels under one name, as a step wants them. `reference` has the same functions."""

from saezoo_train.kernels.adam import update_vector
from saezoo_train.kernels.auxk import auxk, dead_rows
from saezoo_train.kernels.batch_top_k import select_batch_top_k
from saezoo_train.kernels.centre import centre
from saezoo_train.kernels.csc import csc
from saezoo_train.kernels.decode import decode, decode_loss
from saezoo_train.kernels.encode import encode
from saezoo_train.kernels.select import select_above, select_top_k
from saezoo_train.kernels.sums import latent_sums
from saezoo_train.kernels.update import update_rows

__all__ = [
    "auxk",
    "centre",
    "csc",
    "dead_rows",
    "decode",
    "decode_loss",
    "encode",
    "latent_sums",
    "select_above",
    "select_batch_top_k",
    "select_top_k",
    "update_rows",
    "update_vector",
]
