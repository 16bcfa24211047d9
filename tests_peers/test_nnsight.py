"""The example of docs/using.md, run with the real nnsight on the real SmolLM2: it reads and
replaces the tensor that `attach` does.
"""

import re
import runpy
from pathlib import Path

import torch

from saezoo.attaching import attach

DOCS = Path(__file__).parent.parent / "docs"


def test_the_example_of_the_docs_reads_and_replaces_what_attach_does(tmp_path):
    code = re.search(r"```python nnsight\n(.*?)```", (DOCS / "using.md").read_text(), re.DOTALL)[1]
    # a file, because nnsight reads the source of the block that it traces
    script = tmp_path / "example.py"
    script.write_text(code)
    got = runpy.run_path(str(script))
    host, sae, ids = got["host"], got["sae"], got["ids"]["input_ids"]
    with torch.no_grad(), attach(host.model, sae, store=("features", "x")) as run:
        logits = host.model(ids).logits
    assert torch.equal(got["x"], run.x)
    assert torch.equal(got["features"], run.features.to_dense())
    assert torch.equal(got["logits"], logits)
    with torch.no_grad():
        assert not torch.equal(host.model(ids).logits, logits)
