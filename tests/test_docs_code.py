"""Docs that show what they print: the code is run, and prints just that."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```\n(.*?)```\n)?", re.DOTALL)


@pytest.mark.real
@pytest.mark.parametrize("name", ["using.md", "steering.md"])
def test_the_code_of_the_docs_prints_what_stands_below_it(name):
    blocks = BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))
    assert len(blocks) > 1
    names = {}
    for code, expected in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, name, "exec"), names)
        assert out.getvalue() == expected
