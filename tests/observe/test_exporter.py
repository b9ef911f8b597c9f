"""The listener answers Prometheus, bounds everybody else, and dies with its process."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.errors import ListenError
from meshlib.keeper import Keeper
from meshlib.observe import exporter
from meshlib.observe.exporter import MetricsListener
from meshlib.observe.prometheus import Readings, render


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    made.stop()


@pytest.fixture
def listener(keeper: Keeper) -> Iterator[MetricsListener]:
    made = MetricsListener("127.0.0.1:0", lambda: render(Readings(service="orders")))
    made.start(keeper)
    yield made
    made.stop()


def ask(listener: MetricsListener, path: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", listener.port or 0, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def raw(listener: MetricsListener, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", listener.port or 0), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # closed with our request unread
            while part := connection.recv(65536):
                answer += part
    return answer


def test_metrics_are_served_as_text(listener: MetricsListener) -> None:
    """The text of `render`, with the type that Prometheus expects, on a port that was free."""
    status, headers, text = ask(listener, "/metrics?name=x")
    assert status == 200
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'meshlib_observe_info{mesh="",service="orders",version=""} 1' in text


def test_openmetrics_text_is_served_as_such(keeper: Keeper) -> None:
    """The type follows from the text."""
    made = MetricsListener("127.0.0.1:0", lambda: render(Readings(), is_openmetrics=True))
    made.start(keeper)
    assert ask(made, "/metrics")[1]["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    made.stop()


def test_health_follows_readiness(keeper: Keeper) -> None:
    """200 while the process takes work, 503 when it drains."""
    is_ready = True
    made = MetricsListener("127.0.0.1:0", lambda: "", is_ready=lambda: is_ready)
    made.start(keeper)
    assert ask(made, "/readyz")[::2] == (200, "ok\n")
    is_ready = False
    assert ask(made, "/readyz")[::2] == (503, "draining\n")
    made.stop()


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/metrics/"), ("GET", "/metrics%2f.."), ("POST", "/metrics"), ("HEAD", "/metrics")]
)
def test_everything_else_is_not_found(listener: MetricsListener, method: str, path: str) -> None:
    """Two paths, one method."""
    assert ask(listener, path, method)[0] == 404


def test_what_is_no_http_is_refused(listener: MetricsListener) -> None:
    """A line that is no request gets 400, and the connection ends."""
    assert raw(listener, b"\x16\x03\x01hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_large_request_is_refused(listener: MetricsListener) -> None:
    """More than 8 KiB of headers are not read."""
    request = b"GET /metrics HTTP/1.1\r\nx: " + b"a" * exporter.LARGEST + b"\r\n\r\n"
    assert raw(listener, request).startswith(b"HTTP/1.1 431 ")


def test_slow_request_is_cut(listener: MetricsListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not finish the request in time gets no answer, and holds no connection."""
    monkeypatch.setattr(exporter, "LONGEST", 0.05)
    assert raw(listener, b"GET /metrics HTTP/1.1\r\n") == b""


def test_connections_are_bounded(listener: MetricsListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than the limit is closed at once, and a place is free again when somebody leaves."""
    monkeypatch.setattr(exporter, "MOST", 2)
    place = ("127.0.0.1", listener.port or 0)
    with socket.create_connection(place), socket.create_connection(place):
        assert raw(listener, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
    deadline = time.monotonic() + 10
    while not raw(listener, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 "):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("address", "client", "status"),
    [
        ("0.0.0.0:0", ("192.0.2.7", 5), 403),
        ("0.0.0.0:0", ("127.0.0.1", 5), 200),
        ("0.0.0.0:0", ("10.0.0.1", 5), 200),
        ("[::]:0", ("::ffff:127.0.0.1", 5, 0, 0), 200),
        ("[::]:0", ("::ffff:10.0.0.9", 5, 0, 0), 403),
        ("0.0.0.0:0", None, 403),
        ("127.0.0.1:0", ("127.0.0.1", 5), 200),
    ],
)
def test_status_is_told_on_this_machine_only(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, address: str, client: tuple[Any, ...] | None, status: int
) -> None:
    """It has SPIFFE IDs, addresses and serials; where others can reach the listener, they get the metrics."""
    own = ("10.0.0.1", 9464)
    made = MetricsListener(address, lambda: "", status=lambda: {"mesh": "shop"})
    judged = exporter._is_from_here
    monkeypatch.setattr(exporter, "_is_from_here", lambda *_: judged(client, own))
    made.start(keeper)
    assert (ask(made, "/status")[0], ask(made, "/metrics")[0]) == (status, 200)
    made.stop()


def test_renderer_that_fails_is_an_answer_and_a_line_in_the_log(keeper: Keeper, caplog: pytest.LogCaptureFixture) -> None:
    """500 without the reason, which may be anybody's business; the reason is in the log, and the listener lives."""

    def fails() -> str:
        raise RuntimeError("secret")

    made = MetricsListener("127.0.0.1:0", fails)
    made.start(keeper)
    with caplog.at_level(logging.ERROR, logger="meshlib.observe"):
        status, _, text = ask(made, "/metrics")
    assert (status, "secret" in text, "secret" in caplog.text) == (500, False, True)
    assert ask(made, "/healthz")[0] == 200
    made.stop()


def test_address_in_use_is_a_listen_error(listener: MetricsListener, keeper: Keeper) -> None:
    """It says what happened, why probably, and what to do."""
    with pytest.raises(ListenError, match=r"can't be served at 127\.0\.0\.1:\d+: Address already in use\..*port 0"):
        MetricsListener(f"127.0.0.1:{listener.port}", lambda: "").start(keeper)


@pytest.mark.parametrize("address", ["no.such.host.invalid:0", "192.0.2.1:0"])
def test_address_that_is_not_ours_is_a_listen_error(address: str, keeper: Keeper) -> None:
    """A name that nobody knows, an address of another machine."""
    with pytest.raises(ListenError, match="can't be served at"):
        MetricsListener(address, lambda: "").start(keeper)


def test_stopped_listener_gives_its_port_back(keeper: Keeper) -> None:
    """Stopped twice is stopped; another may listen at once."""
    first = MetricsListener("127.0.0.1:0", lambda: "")
    first.start(keeper)
    port = first.port
    first.stop()
    first.stop()
    assert first.port is None
    second = MetricsListener(f"127.0.0.1:{port}", lambda: "")
    second.start(keeper)
    assert ask(second, "/healthz")[0] == 200
    second.stop()


def test_ipv6_is_listened_on_where_there_is_any(keeper: Keeper) -> None:
    """An address in brackets."""
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists() or not Path("/proc/net/if_inet6").read_text():
        pytest.skip("this machine has no IPv6")
    made = MetricsListener("[::1]:0", lambda: "x 1\n")
    made.start(keeper)
    with urllib.request.urlopen(f"http://[::1]:{made.port}/metrics", timeout=10) as answer:
        assert answer.read() == b"x 1\n"
    made.stop()


def test_forked_child_does_not_answer_for_its_parent() -> None:
    """The child gives the socket up: the parent goes on answering, the port is free when the parent ends, and the child
    may listen anew.
    """
    source = """
import os, socket, urllib.request
from meshlib.keeper import shared
from meshlib.observe.exporter import MetricsListener
def ask(listener):
    return urllib.request.urlopen(f"http://127.0.0.1:{listener.port}/metrics", timeout=10).read().decode()
listener = MetricsListener("127.0.0.1:0", lambda: f"pid {os.getpid()}\\n")
listener.start(shared())
parent = f"pid {os.getpid()}\\n"
assert ask(listener) == parent
pid = os.fork()
if pid == 0:
    assert listener.port is None
    listener.start(shared())
    assert ask(listener) == f"pid {os.getpid()}\\n"
    listener.stop()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
for _ in range(5):
    assert ask(listener) == parent
read, write = os.pipe()
here, born = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(write)
    os.write(born, b"x")                # its side of the fork is done: what it inherited is given up
    os.read(read, 1)                    # lives as long as its parent
    os._exit(0)
os.read(here, 1)
port = listener.port
listener.stop()
with socket.socket() as again:
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # connections that are over may linger, listeners not
    again.bind(("127.0.0.1", port))
    again.listen()
os.close(write)
assert os.waitpid(pid, 0)[1] == 0
print("well")
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_real_prometheus_scrapes_it(listener: MetricsListener, tmp_path: Path) -> None:
    """The real server takes every sample: the target is up, and a query gives the value back."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not on PATH")
    port = free_port()
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        f"scrape_configs: [{{job_name: mesh, static_configs: [{{targets: ['127.0.0.1:{listener.port}']}}]}}]\n"
    )
    command = [
        binary,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        found = query(port, 'meshlib_observe_info{service="orders"}')
        up = query(port, "up")
    finally:
        process.terminate()
        process.wait(20)
    assert (found, up) == (["1"], ["1"]), (tmp_path / "log").read_text()


def query(port: int, expression: str) -> list[str]:
    """The values of an instant query, as soon as there are any."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5) as got:
                values = [row["value"][1] for row in json.load(got)["data"]["result"]]
        except OSError:
            values = []
        if values and values != ["0"]:
            return values
        time.sleep(0.2)
    return []
