"""A server that says "x" max_tokens times, a millisecond apart: what the load runs are tested on. argv: open requests.

More than so many at once get 429, and after SIGTERM all get 503; every 7th answer breaks off where argv says "breaks".
"""

import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OPEN, BREAKS = int(sys.argv[1]), "breaks" in sys.argv


class State:
    """What all requests share."""

    lock = threading.Lock()
    running = cancelled = asked = 0
    draining = False


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: stderr has the address alone."""

    def do_GET(self) -> None:
        """Health and metrics."""
        counts = f"requests_running {State.running}\nonevision_edge_requests_waiting 0"
        text = f"# of a fake\nonevision_edge_{counts}\nonevision_edge_requests_cancelled_total {State.cancelled}\n"
        self._whole(503 if State.draining and self.path == "/health" else 200, text.encode())

    def do_POST(self) -> None:
        """A streamed answer, or a refusal."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with State.lock:
            status = 503 if State.draining else 429 if State.running >= OPEN else 200
            State.running += status == 200
            State.asked += status == 200
            broken = BREAKS and State.asked % 7 == 0
        if status != 200:
            self._whole(status, json.dumps({"error": {"message": "not now"}}).encode(), ("Retry-After", "1"))
            return
        try:
            self._stream(body["max_tokens"], broken)
        except OSError:
            State.cancelled += 1
        finally:
            with State.lock:
                State.running -= 1

    def _stream(self, tokens: int, broken: bool) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(tokens):
            time.sleep(0.001)
            self._say({"choices": [{"delta": {"content": "x"}, "finish_reason": None}]})
        if not broken:
            self._say({"choices": [{"delta": {}, "finish_reason": "length"}], "usage": None})
            self._say({"choices": [], "usage": {"completion_tokens": tokens}})
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _say(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def _whole(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """With room for many at once."""

    daemon_threads, request_queue_size = True, 128


def main() -> None:
    """Serve until SIGTERM, then until nothing is under way."""
    server = Server(("127.0.0.1", 0), Handler)

    def drain() -> None:
        while State.running:
            time.sleep(0.01)
        time.sleep(0.2)
        server.shutdown()

    def end(*_: Any) -> None:
        State.draining = True
        threading.Thread(target=drain).start()

    signal.signal(signal.SIGTERM, end)
    print(f"fake at http://127.0.0.1:{server.server_address[1]} (no more than a fake)", file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
