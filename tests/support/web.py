"""A web server on this machine that serves files well or badly, as its attributes say."""

import http.server
import threading
import time
from contextlib import contextmanager


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` by path; understands Range and If-Range.

    cut: ends a body after so many bytes. tag: the ETag. misbehaviour: (handler, body) -> None answers in its place.
    """

    files: dict[str, bytes]
    cut: int | None
    ranges: bool
    tag: str | None
    delay: float
    misbehaviour: object
    requests: list[tuple[str | None, str | None]]

    def do_GET(self):
        body = self.files.get(self.path)
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        self.requests.append((wanted, condition))
        if type(self).misbehaviour is not None:
            return type(self).misbehaviour(self, body)
        if body is None:
            return self.send_error(404)
        start = 0
        if wanted and self.ranges and condition in (None, self.tag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body) and start:
            return self.send_error(416)
        self.answer(206 if start else 200, body[start : start + (self.cut or len(body))], start, len(body))

    def answer(self, status: int, body: bytes, start: int, whole: int, **headers: str):
        self.send_response(status)
        fields = {"Content-Length": str(whole - start), "ETag": self.tag}
        if status == 206:
            fields["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        for name, value in (fields | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(body), 1 << 16):
            self.wfile.write(body[at : at + (1 << 16)])
            time.sleep(self.delay)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    """Yields a class like Server, of its own state, and the address it is served at."""
    state = dict(files={}, cut=None, ranges=True, tag='"1"', delay=0.0, misbehaviour=None, requests=[])
    handler = type("Handler", (Server,), state)
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield handler, f"http://127.0.0.1:{served.server_port}"
    finally:
        served.shutdown()
        served.server_close()
