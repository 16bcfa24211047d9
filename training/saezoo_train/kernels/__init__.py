"""A training step on a GPU, in Triton. `reference` says what each kernel computes.

    centre, encode       activations about b_dec; the encoder's product and the maxima of groups
    select, batch_top_k  which pre-activations are kept, read through the maxima
    decode               reconstruction, squared error and its gradients
    csc, sums            the lists by latent, and sums over them
    update, auxk         Adam on both matrices from the lists; dead latents
    entries, step        the formulas of each architecture, and a whole update
    autograd             the same as differentiable functions, for a loss of one's own

Where Triton is not installed, `reference`, `rows`, `entries` and `step` can be imported.
"""

LONGEST = 512
"""Latents of one token that a list can hold."""
WIDEST = 2**19
"""Latents of which a program can hold the maxima of groups."""
