"""A loopback HTTP server that counts what it is asked, and fails as it is told."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Answer:
    """What a host says. `body` is None where there is nothing to send but a status."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Fault:
    """How one answer goes wrong, for the paths that contain `where`, `times` times."""

    where: str
    kind: str
    """cut: the connection breaks in the middle of the body; flip: a byte is another one; short: the
    body and its length are half; status: another answer."""
    times: int = 1
    method: str = "GET"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)


class FakeServer:
    """Serves what `answer` says, one thread per connection, until the process ends."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[Fault] = []
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"of": self})
        )
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        """What to say to one request; header names are in lower case."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget requests and faults."""
        self.requests.clear()
        self.faults.clear()

    def close(self) -> None:
        """Stop listening, as a host that is down."""
        self._server.shutdown()
        self._server.server_close()

    def fail(self, where: str, kind: str, **how: object) -> None:
        """Let the next answers to paths that contain `where` go wrong, see Fault."""
        self.faults.append(Fault(where, kind, **how))  # type: ignore[arg-type]

    def asked(self) -> Counter[str]:
        """How often each `METHOD /path` was asked for."""
        return Counter(f"{method} {path}" for method, path, _ in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, used up once."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.where in path:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: FakeServer

    def do_GET(self) -> None:
        self._reply("GET")

    def do_HEAD(self) -> None:
        self._reply("HEAD")

    def log_message(self, *_: object) -> None:
        """Say nothing: the test asks `requests`."""

    def _reply(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.of.requests.append((method, path, headers))
        fault = self.of.fault_for(method, path)
        if fault and fault.kind == "status":
            answer = Answer(fault.status, fault.headers)
        else:
            answer = self.of.answer(path, headers)
        body = _ranged(answer, headers)
        if fault and fault.kind == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault and fault.kind == "short":
            body = body[: len(body) // 2]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if method == "HEAD":
            return
        if fault and fault.kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)


def _ranged(answer: Answer, headers: dict[str, str]) -> bytes:
    """The part of the body that `Range: bytes=N-` asks for; the answer becomes a 206."""
    wanted = headers.get("range", "")
    if answer.status != 200 or not wanted.startswith("bytes="):
        return answer.body
    start = int(wanted.removeprefix("bytes=").split("-")[0])
    answer.status = 206
    end, total = len(answer.body) - 1, len(answer.body)
    answer.headers["Content-Range"] = f"bytes {start}-{end}/{total}"
    return answer.body[start:]
