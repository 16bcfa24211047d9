"""Texts come from files of every kind in their order; what is broken is named in one line."""

import gzip
import json
import lzma

import pyarrow as pa
import pytest
from pyarrow import parquet

from saezoo.documents import read_documents
from saezoo.errors import DataError

TEXTS = ["one", "zwei drei", "four\nlines"]


def jsonl(texts, key="text"):
    return "".join(json.dumps({"source": "s", key: text}) + "\n" for text in texts)


def write_parquet(path, texts, key="text"):
    parquet.write_table(pa.table({"id": list(range(len(texts))), key: texts}), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.ndjson", "a.parquet"])
def test_every_kind_of_file_gives_its_documents_in_order_without_the_empty(name, tmp_path):
    path, texts = tmp_path / name, [*TEXTS[:2], "", TEXTS[2]]
    if name.endswith(".parquet"):
        write_parquet(path, texts)
    else:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(jsonl(texts) + "\n")
    assert list(read_documents(path)) == TEXTS
    assert list(read_documents(str(path))) == TEXTS


def test_a_text_file_is_one_document_and_a_folder_is_its_files_by_name(tmp_path):
    (tmp_path / "b.txt").write_text(TEXTS[2], encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS[:2]), encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert list(read_documents(tmp_path)) == TEXTS


def test_another_column_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS, "body"), encoding="utf-8")
    write_parquet(tmp_path / "b.parquet", TEXTS, "body")
    assert list(read_documents(tmp_path, column="body")) == TEXTS * 2


BROKEN = [
    ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2: not JSON"),
    ("a.jsonl", b'{"body": "x", "n": 1}\n', "no text under 'text'; it has body, n"),
    ("a.jsonl", b'{"text": 3}\n', "no text under 'text'"),
    ("a.jsonl", b"[]\n", "it is no object"),
    ("a.jsonl", b"\xff\xfe", "cannot be read"),
    ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ("a.jsonl.xz", b"not xz", "cannot be read"),
    ("a.parquet", b"PAR1 not really", "cannot be read"),
    ("a.bin", b"x", "cannot read text from this"),
    ("a.parquet.gz", b"x", "cannot read text from this"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN, ids=str)
def test_what_is_broken_is_named_in_one_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_documents(tmp_path / name))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    for source, said in [
        (tmp_path / "empty", "in this folder"),
        (tmp_path / "absent.jsonl", "no such file"),
        ("absent.jsonl", "no such file"),
        ("./absent", "no such file"),
        (tmp_path / "a.parquet", "no column 'text'; it has id, body"),
    ]:
        with pytest.raises(DataError, match=said):
            list(read_documents(source))


def test_a_dataset_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="'nobody/nothing-here' could not be read") as caught:
        list(read_documents("nobody/nothing-here"))
    assert "\n" not in str(caught.value)
