"""What the loopback Hub says."""

import json

from tests.fakes.server import Answer


class Refused(Exception):
    """A request that the Hub does not do."""

    def __init__(self, status: int, said: str, code: str = "") -> None:
        super().__init__(said)
        headers = {"Content-Type": "application/json", "X-Error-Message": said}
        if code:
            headers["X-Error-Code"] = code
        self.answer = Answer(status, headers, json.dumps({"error": said}).encode())


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())
