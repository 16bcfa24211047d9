"""A training step on a GPU, in Triton. `reference` says what each kernel computes.

Only `reference` and `rows` can be imported where Triton is not installed.
"""
