"""Is what `meshlib suggest` proposes for the demo enough for the demo, and for nothing else?

The shop runs without an allow rule, permissive and recording; what is proposed goes into another shop, which enforces it while the
demo does all that it does: kills, rotations, retries. Then its gates are asked about every other call that could be thought of. Real
processes and real time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from examples.shop.demo import Demo, is_well
from examples.shop.fleet import Fleet
from examples.shop.shop import SERVICES, TRUST_DOMAIN, Shop
from meshlib._native import core
from meshlib.config import load
from meshlib.observe.traffic import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RATE = 30.0
# All that customers, services and the newsletter do: service, caller, method, path.
DONE = {
    ("storefront", "shopper", "POST", "/buy"),
    ("storefront", "shopper", "GET", "/items/{id}"),
    ("storefront", "shopper", "GET", "/debug/retried"),
    ("orders", "storefront", "POST", "/orders"),
    ("orders", "storefront", "GET", "/items/{id}"),
    ("orders", "by-hand", "POST", "/orders"),
    ("orders", "by-hand", "GET", "/items/{id}"),
    ("orders", "newsletter", "GET", "/items/{id}"),
    ("inventory", "storefront", "POST", "/shop.Inventory/Reserve"),
}


def configure(folder: Path, mode: str, *, is_recording: bool, policies: dict[str, Any]) -> None:
    """The demo's own mesh.yaml with other `allow` lists, or none."""
    file = folder / "mesh.yaml"
    value = yaml.safe_load(file.read_text())
    value["secure"] |= {"mode": mode, "record": is_recording}
    for name, service in value["services"].items():
        secure = service.setdefault("secure", {})
        secure.pop("allow", None)
        secure |= policies.get(name, {}).get("secure", {})
    file.write_text(json.dumps(value))


def recorded(folder: Path) -> set[tuple[str, str, str, str]]:
    traffic = folder / ".meshlib" / "traffic"
    rows = read([traffic]).rows if traffic.exists() else []
    return {(row.service, row.kind.peer.rpartition("/")[2], row.kind.method, row.kind.path) for row in rows}


async def observe(folder: Path) -> None:
    """Let everybody do what they do, until it is written down."""
    with Fleet(folder) as fleet:
        shop = Shop(folder, fleet, RATE, 1)
        configure(folder, "permissive", is_recording=True, policies={})
        await shop.start()
        await asyncio.gather(*(customers(fleet, name) for name in ("shopper", "by-hand")))
        await shop.ask("newsletter", ("GET", "http://orders/items/7"))
        await shop.ask("shopper", ("GET", "http://storefront/debug/retried"))
        end = time.monotonic() + 20
        while not recorded(folder) >= DONE and time.monotonic() < end:
            await asyncio.sleep(0.2)


async def customers(fleet: Fleet, name: str) -> None:
    """A side of the demo's customers, for as long as it takes them to do each thing a few times."""
    lines = 0
    async for _ in fleet.processes[name].lines():
        lines += 1
        if lines == 15:
            fleet.processes[name].signal(signal.SIGTERM)


async def enforce(folder: Path, policies: dict[str, Any]) -> dict[str, Any]:
    """The whole demo under these rules."""
    with Fleet(folder) as fleet:
        shop = Shop(folder, fleet, RATE, 1)
        configure(folder, "enforce", is_recording=False, policies=policies)
        demo = Demo(shop, 5.0)
        with demo.screen:
            await demo.run()
        return demo.result()


def test_the_demo_runs_under_what_is_proposed_for_it_and_everything_else_is_refused(tmp_path: Path) -> None:
    """The record holds what was done; the demo loses no call; all other combinations of callers, methods and paths are refused."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    asyncio.run(observe(before))
    assert recorded(before) == DONE
    text = subprocess.run(
        [str(Path(sys.executable).with_name("meshlib")), "suggest", "--config", str(before / "mesh.yaml")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    policies = yaml.safe_load(text)["services"]
    assert set(policies) == {"storefront", "orders", "inventory"}
    result = asyncio.run(enforce(after, policies))
    assert is_well(result), (result, text)
    refused = 0
    for service in ("storefront", "orders", "inventory"):
        gate = core.Gate()
        gate.publish(load(after / "mesh.yaml", service=service).server_plan(), 0.0)
        paths = {path for *_, path in DONE} | {
            "/",
            "/items",
            "/items/7/x",
            "/orders/7",
            "/debug",
            "/admin",
            "/shop.Inventory/Drop",
        }
        for caller, method, path in itertools.product((*SERVICES, "stranger"), ("GET", "HEAD", "POST", "PUT", "DELETE"), paths):
            allowed = ask(gate, caller, method, path)
            assert allowed is ((service, caller, method, path) in DONE), (service, caller, method, path)
            refused += not allowed
    assert refused > 1000


def ask(gate: core.Gate, caller: str, method: str, path: str) -> bool:
    target = quote(path.replace("{id}", "7")).encode()
    peer = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{caller}"
    entry = gate.begin(method, target, [(b"host", b"shop")], peer, True, 0.0)
    if not entry.status:
        entry.finish(200, 0.0)
    return entry.status == 0
