"""What is done to whole decoder rows each step, some rows at a time, so that they stay in the
processor's cache.
"""

import torch
from torch import Tensor

ROWS = 512


@torch.no_grad()
def remove_parallel_gradient(W_dec_MD: Tensor, grad_MD: Tensor) -> None:
    """Take out of the gradient of unit rows, in place, the part that would only change their
    length (Bricken et al. 2023, "Towards Monosemanticity", appendix).
    """
    for row, grad in zip(W_dec_MD.split(ROWS), grad_MD.split(ROWS), strict=True):
        grad.addcmul_((grad * row).sum(-1, keepdim=True), row, value=-1)


@torch.no_grad()
def normalise_rows(W_dec_MD: Tensor) -> None:
    """Bring every row to length 1, in place."""
    for row in W_dec_MD.split(ROWS):
        row.div_(row.norm(dim=-1, keepdim=True).clamp_min(1e-12))
