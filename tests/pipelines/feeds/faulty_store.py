"""`FaultyStore`: a server in front of an object store that does to its answers what networks do."""

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


Fault = Callable[[BaseHTTPRequestHandler, Answer], None]


def send(handler: BaseHTTPRequestHandler, answer: Answer, length: int | None = None) -> None:
    """The answer, perhaps with another Content-Length than it has bytes."""
    handler.send_response(answer.status)
    for name, value in answer.headers.items():
        if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
            handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(answer.body) if length is None else length))
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(answer.body)
    handler.close_connection = True


def status(code: int, **headers: str) -> Fault:
    """Another status, with headers such as Retry_After."""
    plain = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, answer: send(handler, Answer(code, plain, b"<Error/>"))


def reset(share: float = 0.5) -> Fault:
    """The connection is reset after a share of the body."""

    def fault(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        part = Answer(answer.status, answer.headers, answer.body[: int(share * len(answer.body))])
        send(handler, part, len(answer.body))
        handler.wfile.flush()
        # Closing with a linger of 0 s sends a reset.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return fault


def hang_up(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    """No answer at all."""
    handler.close_connection = True


def truncate(share: float = 0.5) -> Fault:
    """The body ends early, its Content-Length being right."""

    def fault(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        part = Answer(answer.status, answer.headers, answer.body[: int(share * len(answer.body))])
        send(handler, part, len(answer.body))

    return fault


def wrong_length(change: int) -> Fault:
    """A Content-Length that is not the body's."""
    return lambda handler, answer: send(handler, answer, max(0, len(answer.body) + change))


def short_and_consistent(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Half of the body, as if that was all."""
    send(handler, Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2]))


def corrupt(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    """One bit is another one."""
    middle = len(answer.body) // 2
    body = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]
    send(handler, Answer(answer.status, answer.headers, body))


def without_length(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    """Half of the body without a Content-Length, ended by the end of the connection."""
    handler.send_response(answer.status)
    handler.end_headers()
    handler.wfile.write(answer.body[: len(answer.body) // 2])
    handler.close_connection = True


class FaultyStore:
    """Forwards requests to `upstream`, or answers from `pages`; takes the next of `faults` (None: no fault) each time."""

    def __init__(self, upstream: str | None = None):
        self.upstream = upstream and urlsplit(upstream).netloc
        self.pages: dict[str, Answer] = {}  # by path
        self.faults: list[Fault | None] = []
        self.choose: Callable[[str], Fault | None] | None = None  # by path and query, in place of `faults`
        self.requests: list[str] = []  # paths with queries
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()  # lets those go on that hang
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                store.requests.append(self.path)
                store.headers.append(dict(self.headers.items()))
                answer = store.ask(self.path)
                if store.choose is not None:
                    fault = store.choose(self.path)
                else:
                    fault = store.faults.pop(0) if store.faults else None
                (fault or send)(self, answer)

            def log_message(self, *words: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *words: object) -> None: ...  # guests that left, as they may

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self.thread.start()

    def ask(self, path: str) -> Answer:
        if self.upstream is None:
            return self.pages.get(path.partition("?")[0], Answer(404, {}, b"nothing here"))
        connection = HTTPConnection(self.upstream, timeout=30)
        try:
            connection.request("GET", path)
            told = connection.getresponse()
            return Answer(told.status, dict(told.getheaders()), told.read())
        finally:
            connection.close()

    def drip(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        """A few bytes, and then nothing until `released`."""
        handler.send_response(answer.status)
        handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        handler.wfile.write(answer.body[:10])
        handler.wfile.flush()
        self.released.wait(30)

    def drip_headers(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        """A byte of the headers at a time, without end, until `released`."""
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.released.wait(0.02):
            handler.wfile.write(b"x")

    def drip_chunks(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        """The length of a chunk, one digit at a time, without end, until `released`."""
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not self.released.wait(0.02):
            handler.wfile.write(b"0")

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
