"""The text that is on every machine: the docstrings of Python's standard library, and the language
reference behind `help()`. Some 2 MB of English about programming, read and never imported.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip"}


def stdlib_documents() -> Iterator[str]:
    """One document of each module: its docstrings. One of each topic of the language reference."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        if path.parts[-2:] == ("pydoc_data", "topics.py"):
            yield from _topics(tree)
        elif found := list(_docstrings(tree)):
            yield "\n\n".join(found)


def stdlib_version() -> str:
    """What these documents depend on."""
    return sys.version.split()[0]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _topics(tree: ast.Module) -> Iterator[str]:
    """The values of the one dict of pydoc_data/topics.py."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
