"""What is the shop made of, and how is it asked about itself?

Six listening processes, two loads, a certificate authority, one mesh.yaml and one database, all in one folder; a node
agent, if the demo is to run by one. It is built here and nothing is started; what happens to it is the demo's business. What it tells comes from outside:
answers to calls, certificates on the wire, lines of logs, rows of the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.shop import wire
from examples.shop.edges import Meters
from examples.shop.fleet import Fleet, free_addresses, python, write_mesh_yaml
from meshlib.secure.ca import CertificateAuthority

TRUST_DOMAIN = "shop.internal"
SERVICES = ("storefront", "orders", "inventory", "shopper", "newsletter", "by-hand")
LISTENERS = ("storefront", "orders-a", "orders-b", "orders-c", "inventory-a", "inventory-b")
MESHLIB = str(Path(sys.executable).with_name("meshlib"))
VERSIONS = {"orders-a": "v1", "orders-b": "v1", "orders-c": "v2"}


class Shop:
    """Every file and process of the shop."""

    def __init__(self, folder: Path, fleet: Fleet, rate: float, retry: int, *, has_agent: bool = False) -> None:
        self.folder, self.fleet = folder, fleet
        self.identities = folder / "identities"
        self.database = folder / "orders.sqlite"
        self.meters = Meters()
        self.ca = CertificateAuthority.create(folder / "ca", TRUST_DOMAIN)
        for service in SERVICES:
            self.ca.write(service, self.identities)
        ports = free_addresses()
        addresses = {name: next(ports) for name in LISTENERS}
        named = {name.replace("-", "_"): address for name, address in addresses.items()}
        self.has_agent = has_agent
        write_mesh_yaml(folder, named, retry, services_of_agent=SERVICES if has_agent else ())
        if has_agent:
            fleet.add("agent", [MESHLIB, "agent", "run", "--config", str(folder / "mesh.yaml")], {}, str(folder / "data.sock"))
        for name, address in addresses.items():
            self.add_listener(name, address, ports)
        load = python("-m", "examples.shop.load", "--rate", str(rate))
        self.add("shopper", [*load, "mesh"], {}, ports)
        both = [option for name in ("orders-a", "orders-b") for option in ("--address", addresses[name])]
        identity = ("--identity", str(self.identities / "by-hand"), "--server-name", server_name("orders"))
        fleet.add("by-hand", [*load, "hand", *both, *identity], {})

    def add_listener(self, name: str, address: str, ports: Iterator[str]) -> None:
        service = service_of(name)
        environment = {"MESHLIB_SERVICE": service}
        serve = [
            MESHLIB,
            "serve",
            f"examples.shop.{service}:app",
            "--listen",
            address,
        ]
        match service:
            case "orders":
                environment |= {"ORDERS_DATABASE": str(self.database), "ORDERS_VERSION": VERSIONS[name]}
                self.add(name, [*serve, "--threads", "16"], environment, ports, address)
            case "storefront":
                self.add(name, serve, environment, ports, address)
            case _:
                environment |= {"INVENTORY_LISTEN": address}
                self.add(name, python("-m", f"examples.shop.{service}"), environment, ports, address)

    def add(self, name: str, command: list[str], environment: dict[str, str], ports: Iterator[str], address: str = "") -> None:
        """A process of the mesh: one whose metrics are read."""
        metrics = next(ports)
        self.fleet.add(name, command, {**environment, "MESHLIB_METRICS": metrics}, address)
        self.meters.add(name, metrics, address, VERSIONS.get(name, ""))

    async def start(self) -> None:
        if self.has_agent:
            self.fleet.processes["agent"].start()
            await self.fleet.processes["agent"].ready()
        for name in LISTENERS:
            self.fleet.processes[name].start()
        await asyncio.gather(*(self.fleet.processes[name].ready() for name in LISTENERS))

    # --- what it tells

    async def ask(self, service: str, *questions: tuple[str, str]) -> list[dict[str, Any]]:
        """Calls (method, URL) with the identity of a service, made by a process of its own."""
        command = python("-m", "examples.shop.ask", service, *itertools.chain(*questions))
        asker = self.fleet.add(f"ask-{len(self.fleet.processes)}", command, {})
        return [json.loads(line) async for line in asker.lines()]

    async def serials(self, roots: str | None = None) -> dict[str, str]:
        async def one(name: str) -> tuple[str, str]:
            address = self.fleet.processes[name].address
            return name, await wire.serial_of(address, self.identities / "shopper", server_name(service_of(name)), roots)

        return dict(await asyncio.gather(*(one(name) for name in LISTENERS)))

    def refusal(self, called: str, caller: str) -> str:
        """What the log of a service says of the refusal of a caller: the newest line that names it."""
        logs = [process.log.read_text() for name, process in self.fleet.processes.items() if name.startswith(called)]
        lines = [line for log in logs for line in log.splitlines() if "secure.denied" in line and f"/sa/{caller}" in line]
        return lines[-1].partition(" meshlib.server: ")[2] if lines else "(nothing)"

    def twice(self, side: str) -> int:
        """How many orders were executed beyond the first of each purchase, as the service's database has it."""
        executed = [row[0] for row in self.query("SELECT purchase FROM orders WHERE purchase LIKE ?", f"{side}-%")]
        return len(executed) - len(set(executed))

    def missing(self, purchases: set[str]) -> int:
        """How many of these purchases the database doesn't have."""
        return len(purchases - {row[0] for row in self.query("SELECT purchase FROM orders WHERE purchase LIKE ?", "%")})

    def query(self, sql: str, *values: str) -> list[Any]:
        """Rows of the service's database; none before its first order has made it."""
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)) as db:
                return db.execute(sql, values).fetchall()
        except sqlite3.OperationalError:
            return []


def service_of(process: str) -> str:
    return process.partition("-")[0]


def server_name(service: str) -> str:
    return f"{service}.default.{TRUST_DOMAIN}"
