"""The observer reads a whole mesh, and counts what no engine counts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import meshlib
from meshlib.observe import Observer
from meshlib.observe.observer import MOST_HOSTS, MOST_SPEAKERS

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


def test_limits_checks_guards_and_fallbacks_of_a_real_mesh_are_told(tmp_path: Path) -> None:
    """Each has its own keeper of numbers; all of them reach the text."""
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: shop\nsecure: {mode: observe}\nservices:\n  storefront: {}\n  orders:\n"
        '    discover: {static: ["127.0.0.1:1"]}\n'
        "    admit: {in_flight: 7, rate: [{calls: 1, per: 60s}], check: {kind: tcp}}\n"
    )
    mesh = meshlib.Mesh.load(file, service="storefront")
    call = mesh.engine.begin("orders", "GET", "/", [], 1.0)
    call.next(1.0)
    with pytest.raises(meshlib.RateLimited):
        mesh.engine.begin("orders", "GET", "/", [], 1.0)

    @mesh.guard("ledger", fallback=0, retries=0)
    def balance() -> int:
        raise OSError

    assert balance() == 0
    text = mesh.observer.prometheus(mesh)
    for line in (
        'meshlib_admit_limit{service="orders"} 7',
        'meshlib_admit_refused_total{service="orders",reason="rate"} 1',
        'meshlib_balance_weight{service="orders",endpoint="127.0.0.1:1"} 1.0',
        'meshlib_retry_fallbacks_total{service="guard:ledger",kind="value"} 1',
        'meshlib_route_responses_total{service="guard:ledger",code="error"} 1',
        'meshlib_retry_guard_duration_seconds_count{service="guard:ledger"} 1',
    ):
        assert line + "\n" in text
    # The keeper may have made one meanwhile.
    assert 'meshlib_admit_checks_total{service="orders"} ' in text
    assert "meshlib_admit_rate_" not in text
    mesh.close()


class Store:
    """A store of rates that answers at once, and is not asked here."""

    async def take_async(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float:
        return 0.0

    def take(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float:
        return 0.0


def test_rates_that_processes_share_are_told_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked or not: a rate is known from the beginning."""
    monkeypatch.setattr("meshlib.admit.limiter.open_store", lambda name, settings: Store())
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: shop\nsecure: {mode: observe}\nstores: {redis: {url: redis://localhost:1/0}}\nservices:\n  storefront: {}\n"
        "  orders: {admit: {rate: [{name: all, calls: 5, store: redis}]}}\n"
    )
    mesh = meshlib.Mesh.load(file, service="storefront")
    text = mesh.observer.prometheus(mesh)
    assert 'meshlib_admit_rate_asked_total{service="orders",rate="all"} 0\n' in text
    assert 'meshlib_admit_store_away{store="redis"} 0\n' in text
    mesh.close()


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


def test_messages_of_calls_are_added_up_and_bounded(mesh: meshlib.Mesh) -> None:
    """By side, name and method; after a thousand of those, as "other", so that none is lost."""
    observer = Observer()
    observer.tally("client", "stock", "/a.B/C").add(1, 3)
    observer.tally("client", "stock", "/a.B/C").add(2, 0)
    for n in range(MOST_SPEAKERS):
        observer.tally("server", f"spiffe://shop.internal/{n}", "/a.B/C").add(1, 1)
    observer.tally("client", "stock", "/a.B/C").add(1, 1)
    mesh.observer = observer
    counts = observer.readings(mesh, 0.0).messages
    assert counts["client", "stock", "/a.B/C"] == (4, 4)
    assert counts["server", "other", "other"] == (1, 1)
    assert len(counts) == MOST_SPEAKERS + 1


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
