"""Is the public face what was agreed, and is it light?"""

from __future__ import annotations

import inspect
import subprocess
import sys

import meshlib
from meshlib import errors


def test_every_public_name_exists_and_is_documented() -> None:
    """`__all__` is sorted and complete."""
    assert sorted(meshlib.__all__) == meshlib.__all__
    for name in meshlib.__all__:
        assert hasattr(meshlib, name)


def test_the_mesh_offers_what_the_readme_shows() -> None:
    """The reviewed list of what hangs on a Mesh: a change here is a change of the public face."""
    public = sorted(name for name, _ in inspect.getmembers(meshlib.Mesh) if not name.startswith("_"))
    assert public == [
        "add_grpc_health", "add_grpc_port", "asgi", "authorizer", "client", "close", "confirm", "deadline", "drain", "fallbacks", "grpc_channel", "grpc_client_interceptors",
        "grpc_server_interceptors", "guard", "identity", "is_ready", "leave", "leaving", "load", "metrics", "metrics_port", "on_alert", "on_drain", "reload", "reload_failures", "reloads", "serve", "serve_grpc", "service_of", "start", "sync_client", "sync_grpc_channel", "sync_grpc_client_interceptors",
        "sync_grpc_server_interceptors", "sync_serve_grpc", "sync_transport", "transport", "wsgi",
    ]  # fmt: skip


def test_the_tree_of_exceptions_is_the_one_that_is_drawn() -> None:
    """Each exception can be caught as its parent, and the circuit error as pybreaker's."""
    import pybreaker

    drawn = [line for line in (errors.__doc__ or "").splitlines() if "Error" in line or "──" in line]
    for kind in vars(errors).values():
        if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == "meshlib.errors":
            assert any(kind.__name__ in line for line in drawn), kind
            try:
                raise kind("x")
            except errors.MeshError as caught:
                assert caught.reason
    assert issubclass(meshlib.CircuitOpen, pybreaker.CircuitBreakerError)
    assert issubclass(meshlib.DeadlineExceeded, TimeoutError)


def test_importing_loads_nothing_heavy_and_starts_no_thread() -> None:
    """Heavy packages come when they are used."""
    code = (
        "import sys, threading, meshlib; "
        "heavy = {'httpx', 'grpc', 'pydantic', 'cryptography', 'opentelemetry', 'uvicorn', 'yaml', 'asyncio'} & set(sys.modules); "
        "print(sorted(heavy), threading.active_count())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] 1"
