"""qresearch's SAEs on Llama and DeepSeek-R1-Distill-Llama: the file decides, in goodfire.py."""

from saezoo.formats.goodfire import read

__all__ = ["read"]
