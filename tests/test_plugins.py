"""Formats of other packages: installed as pip installs them, found, and never in the way."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saezoo.config import SAEConfig
from saezoo.convert import convert_sae
from saezoo.errors import CannotConvert, FormatError
from saezoo.formats import FORMATS, _plugins, detect, format_module, is_read
from saezoo.load import load_sae
from saezoo.numerics import close
from saezoo.sae import build_sae
from saezoo.save import save_sae

DOCS = Path(__file__).parent.parent / "docs" / "adding-a-format.md"


def worked_example():
    """The module that docs/adding-a-format.md shows, letter for letter."""
    text = DOCS.read_text(encoding="utf-8")
    return text.split("<!-- plugin -->\n```python\n")[1].split("```")[0]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package below tmp_path/site as pip does: its module, and a dist-info folder with
    METADATA and entry_points.txt.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def make(name, code, points):
        (site / f"{name}.py").write_text(code)
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{key} = {value}\n" for key, value in points.items())
        (info / "entry_points.txt").write_text(f"[saezoo.formats]\n{lines}")
        monkeypatch.delitem(sys.modules, name, raising=False)
        _plugins.forget_plugins()
        return site

    _plugins.forget_plugins()
    yield make
    _plugins.forget_plugins()


@pytest.fixture
def columns(install):
    return install("saezoo_columns", worked_example(), {"columns": "saezoo_columns"})


def tiny(**spec):
    cfg = SAEConfig.from_json({"d_in": 6, "d_sae": 24, "architecture": "relu"} | spec)
    generator = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    return build_sae(cfg, {name: torch.randn(shape, generator=generator) for name, shape in shapes})


@pytest.mark.usefixtures("columns")
def test_the_example_of_the_docs_is_written_read_found_and_proven(tmp_path):
    sae = tiny()
    save_sae(sae, tmp_path / "a")
    proof = convert_sae(tmp_path / "a", tmp_path / "b", "columns")
    assert "columns's own formula" in proof.through
    assert detect(tmp_path / "b") == "columns"
    x = torch.randn(9, 6)
    for again in (load_sae(tmp_path / "b"), load_sae(tmp_path / "b", format="columns")):
        assert all(
            torch.equal(*two) for two in zip(again.parameters(), sae.parameters(), strict=True)
        )
        assert close(again(x), sae(x))
    save_sae(tiny(architecture="jumprelu"), tmp_path / "c")
    with pytest.raises(CannotConvert, match="columns cannot express the architecture jumprelu"):
        convert_sae(tmp_path / "c", tmp_path / "d", "columns")
    (tmp_path / "b" / "columns.json").write_text('{"d_in": "six"}')
    with pytest.raises(FormatError, match="d_in is 'six'"):
        load_sae(tmp_path / "b")


@pytest.mark.usefixtures("columns")
def test_it_is_imported_when_it_is_named_or_nothing_else_fits_and_not_before(tmp_path):
    save_sae(tiny(), tmp_path / "a")
    load_sae(tmp_path / "a")
    assert is_read("columns")
    assert "saezoo_columns" not in sys.modules
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "weights.xyz").touch()
    with pytest.raises(FormatError, match="no known format"):
        detect(tmp_path / "odd")
    assert "saezoo_columns" in sys.modules


def test_no_package_replaces_a_format_of_saezoos_own(install, tmp_path, caplog):
    code = worked_example()
    install("impostor", code, {"sparsify": "impostor", "native": "impostor", "mine": "impostor"})
    save_sae(tiny(architecture="topk", k=3, subtract_b_dec=True), tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", "sparsify")
    assert detect(tmp_path / "b") == "sparsify"
    assert format_module("sparsify").__name__ == "saezoo.formats.sparsify"
    assert not caplog.records
    assert is_read("mine")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "the format 'sparsify' of impostor is left out: saezoo has" in caplog.text


BROKEN = [
    ("import a_module_that_nobody_has\n", "cannot be imported (ModuleNotFoundError: No module"),
    ("raise RuntimeError('two\\nlines')\n", "cannot be imported (RuntimeError: two lines)"),
    ("this is no Python\n", "cannot be imported (SyntaxError"),
    ("x = 1\n", "has no FORMAT that is a saezoo.formats.Format"),
    ("from saezoo.formats import Format\nFORMAT = Format('x')\n", "has no function read"),
    (
        "from saezoo.formats import Format\nFORMAT = Format('x', writable=True)\nread = print\n",
        "has no function write",
    ),
]


@pytest.mark.parametrize(("code", "said"), BROKEN, ids=[said for _, said in BROKEN])
@pytest.mark.usefixtures("columns")
def test_one_that_cannot_be_used_is_told_once_in_one_line_and_left_out(
    code, said, install, tmp_path, caplog
):
    install("broken_one", code, {"broken": "broken_one"})
    save_sae(tiny(), tmp_path / "a")
    convert_sae(tmp_path / "a", tmp_path / "b", "columns")
    for _ in range(2):
        assert torch.equal(load_sae(tmp_path / "b").b_enc, load_sae(tmp_path / "a").b_enc)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= 30]
    assert len(warnings) == 1
    assert warnings[0].startswith("the format 'broken' of broken_one is left out: it ")
    assert said in warnings[0]
    assert "\n" not in warnings[0]
    with pytest.raises(FormatError, match="the package that has the format broken cannot be used"):
        load_sae(tmp_path / "a", format="broken")


@pytest.mark.usefixtures("columns")
def test_of_two_with_one_name_the_first_counts_and_the_other_is_told_of(install, caplog):
    install("another", worked_example(), {"columns": "another"})
    with caplog.at_level(logging.WARNING):
        name = format_module("columns").__name__
    other = {"another", "saezoo_columns"} - {name}
    assert f"the format 'columns' of {other.pop()} is left out: {name} has one" in caplog.text


@pytest.mark.usefixtures("columns")
def test_a_format_that_nobody_has_lists_those_of_packages_too(tmp_path):
    save_sae(tiny(), tmp_path / "a")
    with pytest.raises(FormatError, match=r"no format 'nonsense'\. There are: native, .*, columns"):
        load_sae(tmp_path / "a", format="nonsense")
    with pytest.raises(CannotConvert, match="cannot write the format 'nonsense'"):
        convert_sae(tmp_path / "a", tmp_path / "b", "nonsense")


def test_the_command_line_knows_it_too(columns, tmp_path):
    save_sae(tiny(), tmp_path / "a")
    command = [sys.executable, "-m", "saezoo", "convert", "./a", "./b", "--to", "columns"]
    path = f"{columns}:{DOCS.parent.parent}"
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "columns's own formula" in done.stdout
    assert json.loads((tmp_path / "b" / "columns.json").read_text())["d_sae"] == 24


def test_the_table_of_formats_is_not_touched():
    assert list(FORMATS)[:2] == ["native", "openai"]
    assert all(name.isidentifier() for name in FORMATS)
