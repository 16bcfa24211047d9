"""A plain file host on loopback, as those that serve https URLs."""

from tests.fakes.server import Answer, FakeServer


class FakeWeb(FakeServer):
    """Serves `files` by path, with the extra headers of `headers`; 404 for anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.redirects: dict[str, str] = {}

    def answer(self, path: str, _headers: dict[str, str]) -> Answer:
        """One answer of the host."""
        if path in self.redirects:
            return Answer(302, {"Location": self.redirects[path]})
        if path not in self.files:
            return Answer(404)
        return Answer(200, dict(self.headers.get(path, {})), self.files[path])
