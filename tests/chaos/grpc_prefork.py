"""What does gunicorn serve in the tests of gRPC and fork? An application whose module loads a mesh, and whose handler calls by gRPC.

With `preload_app` the module runs in the process that forks. `MESHLIB_CHANNEL` says what it does there with the channel: `after` makes one
in each worker, at its first request; `unused` makes it in the module and calls in the workers only; `used` calls in the module, too,
which is the mistake of which the workers have to hear. The answer tells the process, and what became of the call.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import meshlib
from tests.chaos.grpc_served import COUNT, ECHO

mesh = meshlib.Mesh.load()

_lock = threading.Lock()
_channel: Any = None if os.environ["MESHLIB_CHANNEL"] == "after" else mesh.sync_grpc_channel("inventory")


def channel() -> Any:
    global _channel
    with _lock:
        if _channel is None:
            _channel = mesh.sync_grpc_channel("inventory")
        return _channel


def call() -> dict[str, Any]:
    said: dict[str, Any] = {"pid": os.getpid(), "fault": "", "reason": ""}
    try:
        assert channel().unary_unary(ECHO)(b"x", timeout=5) == b"x"
        assert list(channel().unary_stream(COUNT)(b"2 0", timeout=5)) == [b"0", b"1"]
    except Exception as error:
        said.update(fault=f"{type(error).__name__}: {error}", reason=getattr(error, "reason", ""))
    return said


if os.environ["MESHLIB_CHANNEL"] == "used":
    assert call()["fault"] == ""


def wsgi(environ: dict[str, Any], start_response: Any) -> Any:
    body = json.dumps(call()).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
