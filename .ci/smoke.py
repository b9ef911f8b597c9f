"""Does a fresh install make a call? One service, one call, no certificate, no checkout."""

from __future__ import annotations

import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import meshlib


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
threading.Thread(target=server.serve_forever, daemon=True).start()
with tempfile.TemporaryDirectory() as folder:
    config = Path(folder, "mesh.yaml")
    config.write_text(
        f"mesh: smoke\nsecure: {{mode: observe}}\nservices:\n  me: {{}}\n"
        f"  hello: {{discover: {{static: ['127.0.0.1:{server.server_port}']}}}}\n"
    )
    mesh = meshlib.Mesh.load(config, service="me")
    with mesh.sync_client() as http:
        answer = http.get("http://hello/")
    assert answer.text == "hello", answer
    print(answer.extensions["meshlib.call"].explain())
    mesh.close()
server.shutdown()
print("smoke: a fresh install makes a call")
