"""All SAEs of the table of published ones that the registry was made from are registered, at the
same repo and path, and their releases hold nothing else.
"""

import gzip
import json
from pathlib import Path

import pytest

from saezoo.find import find_sae
from saezoo.registry import expand, read_release

TABLE = Path(__file__).parent / "data" / "published.json.gz"
"""{release: {repo: [ids, their paths, where * stands for the id]}}"""


def _published() -> dict[str, dict[str, tuple[str, str]]]:
    """{release: {id: (source, path)}}"""
    table = json.loads(gzip.decompress(TABLE.read_bytes()))
    return {
        release: {
            id: (f"hf://{repo}", path.replace("*", id))
            for repo, columns in repos.items()
            for id, path in zip(*columns, strict=True)
        }
        for release, repos in table.items()
    }


PUBLISHED = _published()


def test_the_table_is_whole():
    assert len(PUBLISHED) == 170
    assert sum(map(len, PUBLISHED.values())) == 13_857


@pytest.mark.parametrize("release", PUBLISHED)
def test_a_release_is_registered_as_published_and_nothing_besides(release):
    known = read_release(release)
    assert not known.is_open
    registered = {key: (entry.source, entry.path) for key, entry in expand(known).items()}
    assert registered == PUBLISHED[release]
    for key in list(registered)[:: max(1, len(registered) // 3)]:
        entry = find_sae(release, key)
        assert (entry.source, entry.path) == PUBLISHED[release][key]
        assert entry.model
        assert entry.layer is not None or entry.site.point == "embed"
