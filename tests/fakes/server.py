"""A loopback HTTP server that counts what it is asked, and fails as it is told."""

import threading
from collections import Counter
from collections.abc import Callable
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
    body and its length are half; status: another answer. Of what is sent to the host: hangup: the
    connection breaks in the middle of it, and the host does nothing; rot: a byte arrives as
    another one."""
    times: int = 1
    after: int = 0
    """How many such requests go well before."""
    method: str = "GET"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)


class FakeServer:
    """Serves what `answer` says, one thread per connection, until the process ends."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: list[Fault] = []
        self.events: list[tuple[str, str, Callable[[], object]]] = []
        self._one_at_a_time = threading.Lock()
        self.now = threading.local()
        """Of the request that this thread answers: `method`, `query` and `body`."""
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
        """Forget requests, faults and events."""
        self.requests.clear()
        self.faults.clear()
        self.events.clear()

    def close(self) -> None:
        """Stop listening, as a host that is down."""
        self._server.shutdown()
        self._server.server_close()

    def fail(self, where: str, kind: str, **how: object) -> None:
        """Let the next answers to paths that contain `where` go wrong, see Fault."""
        self.faults.append(Fault(where, kind, **how))  # type: ignore[arg-type]

    def meanwhile(self, method: str, where: str, do: Callable[[], object]) -> None:
        """Let something happen just before the next such request is answered."""
        self.events.append((method, where, do))

    def asked(self) -> Counter[str]:
        """How often each `METHOD /path` was asked for."""
        return Counter(f"{method} {path}" for method, path, _ in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, used up once."""
        with self._one_at_a_time:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.where in path:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def happen(self, method: str, path: str) -> None:
        """What was to happen before this request, once."""
        with self._one_at_a_time:
            due = [event for event in self.events if event[0] == method and event[1] in path]
            for event in due:
                self.events.remove(event)
        for _method, _where, do in due:
            do()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: FakeServer

    def do_GET(self) -> None:
        self._reply("GET")

    def do_HEAD(self) -> None:
        self._reply("HEAD")

    def do_POST(self) -> None:
        self._reply("POST")

    def do_PUT(self) -> None:
        self._reply("PUT")

    def log_message(self, *_: object) -> None:
        """Say nothing: the test asks `requests`."""

    def _reply(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.of.requests.append((method, path, headers))
        fault = self.of.fault_for(method, path)
        sent = self._receive(fault)
        if sent is None:
            self.close_connection = True
            return
        now = self.of.now
        now.method, now.query, now.body = method, urlsplit(self.path).query, sent
        self.of.happen(method, path)
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

    def _receive(self, fault: Fault | None) -> bytes | None:
        """The body of the request; None where the connection is to break in the middle of it."""
        length = int(self.headers.get("Content-Length", 0))
        if fault and fault.kind == "hangup":
            self.rfile.read(length // 2)
            return None
        if self.headers.get("Transfer-Encoding") == "chunked":
            # no storage takes it, so what was sent is of no account
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
        sent = self.rfile.read(length)
        if fault and fault.kind == "rot":
            return bytes([sent[0] ^ 1]) + sent[1:]
        return sent


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
