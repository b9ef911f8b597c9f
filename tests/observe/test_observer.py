"""The observer reads a whole mesh, and counts what no engine counts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import meshlib
from meshlib.observe import Observer
from meshlib.observe.observer import MOST_HOSTS

MESH = """\
mesh: shop
secure: {mode: observe}
services:
  storefront: {route: [{name: items, match: {path: {template: "/items/{id}"}}}]}
  orders: {discover: {static: ["127.0.0.1:1"]}}
  stock: {protocol: grpc}
"""


@pytest.fixture
def mesh(tmp_path: Path) -> meshlib.Mesh:
    file = tmp_path / "mesh.yaml"
    file.write_text(MESH)
    return meshlib.Mesh.load(file, service="storefront")


def test_numbers_of_a_whole_mesh_come_together(mesh: meshlib.Mesh) -> None:
    """Engine, gate, discovery, keeper and configuration of a real mesh, in one text."""
    call = mesh.engine.begin("orders", "GET", "/", [], 1.0)
    token = call.next(1.0)[1]
    call.head(token, 0, 200, 1.01)
    call.finish(token, 0, 1.02)
    mesh.gate.begin("GET", b"/items/7", [(b"host", b"x")], None, False, 1.0).finish(200, 1.5)
    mesh.observer.egress("example.com")
    text = mesh.observer.prometheus(mesh)
    for line in (
        f'meshlib_observe_info{{mesh="shop",service="storefront",version="{meshlib.__version__}"}} 1',
        'meshlib_route_requests_total{service="orders"} 1',
        'meshlib_balance_responses_total{service="orders",endpoint="127.0.0.1:1",code="200"} 1',
        'meshlib_secure_would_deny_total{service="storefront",route="items",method="GET",peer=""} 1',
        'http_server_request_duration_seconds_count{http_request_method="GET",http_route="/items/{id}",url_scheme="http"} 1',
        'meshlib_discover_endpoints{service="orders",source="static"} 1',
        'meshlib_route_egress_total{host="example.com"} 1',
    ):
        assert line + "\n" in text
    assert mesh.observer.prometheus(mesh, is_openmetrics=True).endswith("# EOF\n")


def test_failed_reload_is_counted(mesh: meshlib.Mesh) -> None:
    """What the mesh counts itself is told, too."""
    mesh.config.file.write_text("mesh: [\n")
    with pytest.raises(meshlib.ConfigError):
        mesh.reload()
    assert "meshlib_observe_reload_failures_total 1\n" in mesh.observer.prometheus(mesh)


def test_hosts_of_egress_are_bounded_and_none_is_lost(mesh: meshlib.Mesh) -> None:
    """A hundred names, then "other"; eight threads count every call."""
    observer = Observer()

    def go(part: int) -> None:
        for n in range(1000):
            observer.egress(f"host-{part}-{n % 50}")

    threads = [threading.Thread(target=go, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mesh.observer = observer
    counts = observer.readings(mesh, 0.0).egress
    assert (len(counts), sum(counts.values())) == (MOST_HOSTS + 1, 8000)
    assert counts["other"] > 0


def test_observer_works_in_a_child_forked_while_it_counted() -> None:
    """The moment of the fork does not matter: the child counts, too."""
    source = """
import os, threading
from meshlib.observe import Observer, observer as module
observer = Observer()
module._lock.acquire()                      # another thread counts at this very moment
pid = os.fork()
if pid == 0:
    observer.egress("example.com")
    os._exit(0)
module._lock.release()
print(os.waitpid(pid, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"
