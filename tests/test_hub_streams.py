"""Data sets of the Hub, streamed by the real `datasets` client from a loopback Hub."""

import gzip
import json
import os
import signal
import uuid

import pytest
from saezoo_train import train_sae

from saezoo.documents import read_documents
from saezoo.errors import DataError, Stopped
from tests.test_train_resume import At, untimed, weights
from tests.tiny_host import recipe, texts, write_host

pytestmark = pytest.mark.usefixtures("one_thread")


def lines(documents):
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in documents).encode()


@pytest.fixture
def name(hub):
    """A data set that no earlier test has asked for: `datasets` keeps what it was told."""
    name = f"someone/texts-{uuid.uuid4().hex[:8]}"
    hub.datasets[name] = {
        "data/train-00000.jsonl": lines(["first", "", "second"]),
        "data/train-00001.jsonl.gz": gzip.compress(lines(["third"])),
        "data/test.jsonl": lines(["held"]),
    }
    return name


def test_documents_come_in_order_from_every_file_of_the_split(name):
    assert list(read_documents(name)) == ["first", "second", "third"]
    assert list(read_documents(name, split="test")) == ["held"]


def test_nothing_is_read_that_is_not_asked_for(name, hub):
    stream = read_documents(name)
    assert next(stream) == "first"
    assert not [path for path in hub.asked() if "train-00001" in path and "GET" in path]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"column": "body"}, "no column 'body'; it has text, n"),
        ({"split": "dev"}, "dev"),
        ({"subset": "de"}, "de"),
    ],
)
def test_what_is_not_there_is_one_line(name, given, said):
    with pytest.raises(DataError, match=said) as caught:
        list(read_documents(name, **given))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hub")
def test_a_data_set_that_is_not_there():
    with pytest.raises(DataError, match="'someone/nothing' could not be read"):
        list(read_documents("someone/nothing"))


def test_a_run_over_a_stream_that_is_stopped_goes_on_to_the_same_weights(name, hub, tmp_path):
    hub.datasets[name] = {"train.jsonl": lines(texts(120))}
    chosen = recipe(write_host(tmp_path / "host"), name, save_dtype="float32")
    train_sae(chosen, tmp_path / "whole")
    at = At(27, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        train_sae(chosen, tmp_path / "stopped", watch=at)
    assert train_sae(chosen, tmp_path / "stopped").resumed_at == 27
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert untimed(tmp_path / "stopped.run") == untimed(tmp_path / "whole.run")
