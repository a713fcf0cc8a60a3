"""A stand-in for Ollama's server.

Written after what Ollama's API documentation and source say of blobs, create, tags, delete and
version.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class StandIn:
    """What a server has, was asked, and how it misbehaves.

    Attributes:
        blobs: digest to bytes.
        models: name to the body it was made with.
        asked: (method, path) of each request.
        lengths: Content-Length and Transfer-Encoding of each file that was sent.
        dies_at: close the connection after so many bytes of a file.
        refuses: (path, status, text) of what is answered instead.
        lines: what create answers.
        prompt: what it makes of the body of a chat.
        tools: whether chats may have tools.
    """

    url: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    lengths: list[tuple[str | None, str | None]] = field(default_factory=list)
    dies_at: int | None = None
    refuses: tuple[str, int, str] | None = None
    prompt: Callable[[dict], str] = lambda _body: ""
    tools: bool = True
    lines: list[str] = field(
        default_factory=lambda: [
            '{"status": "parsing GGUF"}',
            '{"status": "copying", "completed": 5, "total": 10}',
            '{"status": "success"}',
        ]
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def known(self) -> StandIn:
        return self.server.known

    def log_message(self, *_):
        pass

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def refused(self) -> bool:
        self.known.asked.append((self.command, self.path))
        if self.known.refuses and self.path.startswith(self.known.refuses[0]):
            self.close_connection = True
            self.answer(*self.known.refuses[1:])
            return True
        return False

    def do_HEAD(self):
        if not self.refused():
            self.answer(200 if self.path.rpartition("/")[2] in self.known.blobs else 404)

    def do_GET(self):
        if self.refused():
            return
        models = [{"name": name} for name in self.known.models]
        known = {"/api/version": {"version": "0.0.1"}, "/api/tags": {"models": models}}
        self.answer(200, json.dumps(known[self.path]))

    def do_DELETE(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        del self.known.models[body["model"]]
        self.answer(200)

    def do_POST(self):
        if self.refused():
            return
        if self.path == "/api/create":
            self.create(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            return
        if self.path == "/api/chat":
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body.get("tools") and not self.known.tools:
                self.answer(400, json.dumps({"error": f"{body['model']} does not support tools"}))
                return
            said = {"message": {"role": "assistant", "content": "ls"}}
            if body.get("_debug_render_only"):
                said = {"_debug_info": {"rendered_template": self.known.prompt(body)}}
            self.answer(200, json.dumps(said))
            return
        size = int(self.headers["Content-Length"])
        self.known.lengths.append(
            (self.headers["Content-Length"], self.headers["Transfer-Encoding"])
        )
        if self.known.dies_at is not None:
            self.rfile.read(self.known.dies_at)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        data, digest = self.rfile.read(size), self.path.rpartition("/")[2]
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            self.answer(400, '{"error": "digest mismatch"}')
            return
        self.known.blobs[digest] = data
        self.answer(201)

    def create(self, body: dict) -> None:
        for digest in (body.get("files") or {}).values():
            assert digest in self.known.blobs
        name = body["model"] if ":" in body["model"] else f"{body['model']}:latest"
        self.known.models[name] = body
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in self.known.lines:
            data = f"{line}\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def stand_in():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.known = StandIn(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.known
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
