"""What of Consul's HTTP API does the mesh use, and how does an agent answer it?

A stand-in for `consul agent -dev`, for machines that have none: real HTTP on loopback, on a thread of its own. Its answers have the
shape, the codes and the headers of Consul's: a blocking query is held until the index of its own resource has grown, or its wait and up
to a sixteenth are over; a snapshot that is restored wakes everybody, with an index that may be smaller; a TTL that nobody renews is
critical; an unknown check is a 404. Each test that needs no fault runs against a real agent too, if there is one (`conftest.py`).

What a real one can't be made to do on request is a method here: `restore`, `fail`, `pause`, `kill`.
It has one node, one server and no Raft, and of filters it understands one comparison.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from integrations.consul.tests.consul_ca import ConsulAuthority

PATIENCE = 10.0
NODE = {"ID": "9a2c7a6b-7b4e-4f0e-9a53-4a4f1d1b2c3d", "Node": "stand-in", "Address": "127.0.0.1", "Datacenter": "dc1", "Meta": {}}
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class StandIn:
    """One agent. `start` and what follows may be called from any thread; the state belongs to its own loop."""

    def __init__(self) -> None:
        self.port = 0
        self.tls: ssl.SSLContext | None = None
        self.socket = ""  # the path of a UNIX socket to listen on beside
        self.token = ""  # if set, what an ACL token must be
        self.requests: list[tuple[str, str, dict[str, str], dict[str, str]]] = []  # method, path, query, headers
        self.fault = ""
        self.last_contact = 0
        self.has_leader = True
        self.loop: asyncio.AbstractEventLoop | None = None
        self.forget()

    def forget(self) -> None:
        """As after a restart in dev mode: nothing is known any more."""
        self.index = 10
        self.services: dict[str, dict[str, Any]] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self.touched: dict[str, int] = {}  # by resource, the index of its last change
        self.kv: dict[str, dict[str, Any]] = {}
        self.authority = ConsulAuthority()
        self.leafs: dict[str, dict[str, Any]] = {}
        self.waiting: set[asyncio.Future[None]] = set()
        self.timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    # ------------------------------------------------------------------ life

    def start(self) -> StandIn:
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="stand-in", daemon=True)
        self.thread.start()
        assert ready.wait(PATIENCE)
        return self

    def kill(self) -> None:
        """Every connection breaks, and nobody listens any more."""
        if self.loop is not None and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self._ended.set)
            self.thread.join(PATIENCE)
            assert not self.thread.is_alive()

    def restart(self, *, keeps: bool = False) -> None:
        """`keeps`: as an agent with a data directory does."""
        self.kill()
        if not keeps:
            self.forget()
        self.start()

    def pause(self) -> None:
        """The process is stopped: the kernel takes connections and bytes, and nobody answers."""
        self._on_loop(self._resumed.clear)

    def resume(self) -> None:
        self._on_loop(self._resumed.set)

    def fail(self, fault: str = "500") -> None:
        """From now on every question is answered so, and those that wait are answered at once: 500, reset, garbage, cut, object, no-index,
        filtered, 429, huge, redirect. "" ends it."""

        def apply() -> None:
            self.fault = fault
            self._wake()

        self._on_loop(apply)

    def restore(self, index: int) -> None:
        """The servers were restored from a snapshot: everybody is woken, with an index that may be smaller."""

        def apply() -> None:
            self.index = index
            self.touched = dict.fromkeys(self.touched, index)
            self._wake()

        self._on_loop(apply)

    def set_index(self, of: str, index: int) -> None:
        """Whatever it was: the next answers have this one, and everybody is woken."""
        self._on_loop(lambda: (self.touched.__setitem__(of, index), self._wake()))

    def lose(self, service_id: str) -> None:
        """The agent doesn't know the entry any more, as after a restart without its data."""
        self._on_loop(lambda: self._deregister(service_id))

    def wake(self) -> None:
        self._on_loop(self._wake)

    def asked(self, path: str) -> list[dict[str, str]]:
        """The query of each question that was asked about a path."""
        return [query for _, asked, query, _ in list(self.requests) if asked.startswith(path)]

    def _on_loop(self, work: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return work()

        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)

    async def _serve(self, ready: threading.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self._ended, self._resumed = asyncio.Event(), asyncio.Event()
        self._resumed.set()
        app = web.Application(client_max_size=4 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        # As Consul does: a question whose asker has gone is not held any longer.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self.tls)
        await site.start()
        self.port = runner.addresses[0][1]
        if self.socket:
            await web.UnixSite(runner, self.socket).start()
        ready.set()
        await self._ended.wait()
        self._resumed.set()
        for timer in self.timers.values():
            timer.cancel()
        assert runner.server is not None
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    # ------------------------------------------------------------------ one answer

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path, dict(request.query), dict(request.headers)))
        await self._resumed.wait()
        if self.fault:
            return await self._faulty(request)
        if "ns" in request.query or "partition" in request.query:
            return text(400, 'Invalid query parameter: "ns" - Namespaces are a Consul Enterprise feature')
        path, body = request.path, await request.read()
        try:
            answer = await self._routed(request, path, body)
        except Refused as error:
            return text(error.status, str(error))
        await self._resumed.wait()
        return await self._faulty(request) if self.fault else answer

    async def _routed(self, request: web.Request, path: str, body: bytes) -> web.Response:
        known: tuple[tuple[str, str, Callable[..., Coroutine[Any, Any, web.Response]]], ...] = (
            ("GET", "/v1/health/service/", self._health),
            ("PUT", "/v1/agent/service/register", self._register),
            ("PUT", "/v1/agent/service/deregister/", self._deregistered),
            ("GET", "/v1/agent/service/", self._one),
            ("PUT", "/v1/agent/check/", self._check),
            ("GET", "/v1/agent/connect/ca/roots", self._roots),
            ("GET", "/v1/agent/connect/ca/leaf/", self._leaf),
            ("PUT", "/v1/connect/ca/configuration", self._rotate),
            ("GET", "/v1/kv/", self._kv),
            ("PUT", "/v1/kv/", self._kv),
            ("DELETE", "/v1/kv/", self._kv),
            ("GET", "/v1/status/leader", self._leader),
        )
        for method, prefix, answer in known:
            if request.method == method and path.startswith(prefix):
                return await answer(request, path.removeprefix(prefix), body)
        raise Refused(404, f"Invalid URL path: not a recognized HTTP API endpoint {path}")

    async def _faulty(self, request: web.Request) -> web.StreamResponse:
        fault = self.fault
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "garbage":
            return web.Response(body=b"\x00\xff<html>[{", headers=self._meta(self.index + 1))
        if fault == "object":
            return web.Response(text='{"Node": []}', headers=self._meta(self.index + 1))
        if fault == "nonsense":
            return web.Response(text='[{"Service": 7}, null, [], {"Service": {"Port": "x"}}]', headers=self._meta(self.index + 1))
        if fault == "deep":
            return web.Response(text="[" * 200_000, headers=self._meta(self.index + 1))
        if fault == "no-index":
            return web.Response(text="[]")
        if fault == "empty":
            return web.Response(text="[]", headers=self._meta(self.index + 1))
        if fault == "filtered":
            return web.Response(text="[]", headers={**self._meta(self.index), "X-Consul-Results-Filtered-By-ACLs": "true"})
        if fault == "redirect":
            return web.Response(status=307, headers={"Location": f"{self.url}/elsewhere"})
        if fault == "cut":
            response = web.StreamResponse(headers={**self._meta(self.index), "Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'[{"Node": {')
            assert request.transport is not None
            request.transport.abort()
            return response
        return text(429 if fault == "429" else 500, "Your request is rate limited" if fault == "429" else "No cluster leader")

    def _meta(self, index: int) -> dict[str, str]:
        return {
            "Content-Type": "application/json",
            "X-Consul-Index": str(index),
            "X-Consul-KnownLeader": "true" if self.has_leader else "false",
            "X-Consul-LastContact": str(self.last_contact),
        }

    def _may(self, request: web.Request) -> bool:
        return not self.token or request.headers.get("X-Consul-Token", "") == self.token

    def _must(self, request: web.Request) -> None:
        if not self._may(request):
            sent = "X-Consul-Token" in request.headers
            raise Refused(403, "ACL not found" if sent else "Permission denied: anonymous token lacks permission 'service:write'")

    # ------------------------------------------------------------------ blocking queries

    def _touch(self, *resources: str) -> None:
        self.index += 1
        for resource in resources:
            self.touched[resource] = self.index
        self._wake()

    def _wake(self) -> None:
        waiting, self.waiting = self.waiting, set()
        for each in waiting:
            if not each.done():
                each.set_result(None)

    def _of(self, resource: str) -> int:
        """A service that isn't there has the index of the last one that went, and a key that of the whole store."""
        return self.touched.get(resource, self.touched.get(f"{resource.partition(':')[0]}:", 1))

    async def _held(self, request: web.Request, resource: str) -> int:
        """Wait as the query says; the index to answer with."""
        asked = request.query.get("index", "")
        if not asked:
            return self._of(resource)
        if not asked.isdigit():
            raise Refused(400, "Invalid index")
        index, wait = int(asked), min(600.0, duration(request.query.get("wait", "5m")))
        end = asyncio.get_running_loop().time() + wait + random.uniform(0, wait / 16)
        while index and self._of(resource) <= index and not self.fault:
            left = end - asyncio.get_running_loop().time()
            woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.add(woken)
            try:
                async with asyncio.timeout(left):
                    await woken
            except TimeoutError:
                break
            finally:
                self.waiting.discard(woken)
            if self._of(resource) < index:
                break  # the store that was waited for was given up
        return self._of(resource)

    # ------------------------------------------------------------------ services

    async def _health(self, request: web.Request, name: str, body: bytes) -> web.Response:
        resource = f"service:{name}"
        index = await self._held(request, resource)
        entries = [self._entry(each) for each in self.services.values() if each["Service"] == name]
        query = request.query
        for tag in query.getall("tag", []):
            entries = [each for each in entries if tag in each["Service"]["Tags"]]
        if "filter" in query:
            left, mark, right = query["filter"].partition(" == ")
            if not mark or not left.startswith("Service.Meta."):
                raise Refused(400, f"Failed to create boolean expression evaluator: {query['filter']}")
            entries = [each for each in entries if each["Service"]["Meta"].get(left.split(".")[2]) == right.strip('"')]
        if query.get("passing") in {"", "1", "true"} and "passing" in query:
            entries = [each for each in entries if all(check["Status"] == "passing" for check in each["Checks"])]
        if query.get("dc", "dc1") != "dc1":
            raise Refused(500, f"No path to datacenter: {query['dc']}")
        headers = self._meta(index)
        if query.get("index", "0") != "0":
            # Answered from the agent's own stream of changes, which knows of no leader.
            headers |= {"X-Consul-Query-Backend": "streaming", "X-Consul-KnownLeader": "false"}
        if entries and not self._may(request):
            entries, headers = [], {**headers, "X-Consul-Results-Filtered-By-ACLs": "true"}
        return web.Response(text=json.dumps(entries), headers=headers)

    def _entry(self, service: dict[str, Any]) -> dict[str, Any]:
        serf = {"Node": NODE["Node"], "CheckID": "serfHealth", "Name": "Serf Health Status", "Status": "passing", "ServiceID": ""}
        checks = [check for check in self.checks.values() if check["ServiceID"] == service["ID"]]
        shown = [{key: value for key, value in check.items() if not key.startswith("_")} for check in checks]
        return {"Node": {**NODE, "ModifyIndex": 7}, "Service": service, "Checks": [serf, *shown]}

    async def _register(self, request: web.Request, _: str, body: bytes) -> web.Response:
        self._must(request)
        said = lowered(json.loads(body))
        if not said.get("name"):
            raise Refused(400, "Missing service name")
        meta, weights = said.get("meta") or {}, lowered(said.get("weights") or {"passing": 1, "warning": 1})
        for key, value in meta.items():
            if len(key) > 128 or len(value) > 512 or not all(char.isalnum() or char in "-_" for char in key):
                raise Refused(400, f"Invalid Service Meta: Couldn't load metadata pair ('{key}', '{value}')")
        if len(meta) > 64:
            raise Refused(400, "Invalid Service Meta: Node metadata cannot contain more than 64 key/value pairs")
        if weights.get("passing", 1) < 1:
            raise Refused(400, "Invalid Weights: Passing must be greater than 0")
        service_id = said.get("id") or said["name"]
        before = self.services.get(service_id)
        self.index += 1
        self.services[service_id] = {
            "ID": service_id,
            "Service": said["name"],
            "Tags": said.get("tags") or [],
            "Address": said.get("address", ""),
            "Meta": meta,
            "Port": said.get("port", 0),
            "Weights": {"Passing": weights.get("passing", 1), "Warning": weights.get("warning", 1)},
            "EnableTagOverride": False,
            "CreateIndex": before["CreateIndex"] if before else self.index,
            "ModifyIndex": self.index,
        }
        if "replace-existing-checks" in request.query:
            for check_id in [key for key, check in self.checks.items() if check["ServiceID"] == service_id]:
                self._end_check(check_id)
        checks = [lowered(check) for check in [*(said.get("checks") or []), *([said["check"]] if said.get("check") else [])]]
        for number, check in enumerate(checks):
            check_id = check.get("checkid") or f"service:{service_id}" + (f":{number + 1}" if len(checks) > 1 else "")
            self.checks[check_id] = {
                "Node": NODE["Node"],
                "CheckID": check_id,
                "Name": f"Service '{said['name']}' check",
                "Status": check.get("status") or "critical",
                "ServiceID": service_id,
                "ServiceName": said["name"],
                "Type": "ttl" if check.get("ttl") else "http",
                "_ttl": duration(check["ttl"]) if check.get("ttl") else 0.0,
                "_said": check,
            }
            self._arm(check_id)
        self._touch(f"service:{said['name']}")
        return web.Response()

    async def _deregistered(self, request: web.Request, service_id: str, body: bytes) -> web.Response:
        self._must(request)
        if service_id not in self.services:
            raise Refused(404, f'Unknown service ID "{service_id}". Ensure that the service ID is passed, not the service name.')
        self._deregister(service_id)
        return web.Response()

    def _deregister(self, service_id: str) -> None:
        name = self.services.pop(service_id)["Service"]
        for check_id in [key for key, check in self.checks.items() if check["ServiceID"] == service_id]:
            self._end_check(check_id)
        self._touch(f"service:{name}", "service:")

    async def _one(self, request: web.Request, service_id: str, body: bytes) -> web.Response:
        if service_id not in self.services:
            raise Refused(404, f"unknown service ID: {service_id}")
        return web.json_response(self.services[service_id])

    async def _check(self, request: web.Request, rest: str, body: bytes) -> web.Response:
        self._must(request)
        word, _, check_id = rest.partition("/")
        status = {"pass": "passing", "warn": "warning", "fail": "critical"}.get(word)
        if status is None:
            raise Refused(404, "Invalid URL path")
        check = self.checks.get(check_id)
        if check is None:
            raise Refused(404, f'Unknown check ID "{check_id}". Ensure that the check ID is passed, not the check name.')
        if not check["_ttl"]:
            raise Refused(500, f'CheckID "{check_id}" does not have associated TTL')
        self._set(check_id, status)
        self._arm(check_id)
        return web.Response()

    def _set(self, check_id: str, status: str) -> None:
        check = self.checks[check_id]
        if check["Status"] != status:
            check["Status"] = status
            self._touch(f"service:{check['ServiceName']}")

    def _arm(self, check_id: str) -> None:
        if timer := self.timers.pop(check_id, None):
            timer.cancel()
        seconds = self.checks[check_id]["_ttl"]
        if seconds:
            self.timers[check_id] = asyncio.get_running_loop().call_later(seconds, self._set, check_id, "critical")

    def _end_check(self, check_id: str) -> None:
        del self.checks[check_id]
        if timer := self.timers.pop(check_id, None):
            timer.cancel()

    # ------------------------------------------------------------------ keys and values

    async def _kv(self, request: web.Request, key: str, body: bytes) -> web.Response:
        resource = f"key:{key}"
        if request.method == "PUT":
            self._must(request)
            self.index += 1
            created = self.kv[key]["CreateIndex"] if key in self.kv else self.index
            value = base64.b64encode(body).decode() if body else None
            self.kv[key] = {
                "LockIndex": 0,
                "Key": key,
                "Flags": 0,
                "Value": value,
                "CreateIndex": created,
                "ModifyIndex": self.index,
            }
            self.index -= 1
            self._touch(resource)
            return web.json_response(True)
        if request.method == "DELETE":
            self._must(request)
            self.kv.pop(key, None)
            self._touch(resource, "key:")
            return web.json_response(True)
        self._must(request)
        index = await self._held(request, resource)
        if key not in self.kv:
            return web.Response(status=404, headers=self._meta(index))
        return web.Response(text=json.dumps([self.kv[key]]), headers=self._meta(index))

    # ------------------------------------------------------------------ the CA

    async def _roots(self, request: web.Request, _: str, body: bytes) -> web.Response:
        index = await self._held(request, "roots:")
        return web.Response(text=json.dumps(self.authority.roots()), headers=self._meta(max(index, 8)))

    async def _leaf(self, request: web.Request, name: str, body: bytes) -> web.Response:
        self._must(request)
        if name not in self.leafs:
            self._issue(name)
        index = await self._held(request, f"leaf:{name}")
        return web.Response(text=json.dumps(self.leafs[name]), headers=self._meta(index))

    def _issue(self, name: str) -> None:
        self.index += 1
        self.leafs[name] = self.authority.leaf(name, self.index)
        self.index -= 1
        self._touch(f"leaf:{name}")

    async def _rotate(self, request: web.Request, _: str, body: bytes) -> web.Response:
        """Another root beside the old one, and new leafs by it."""
        self._must(request)
        self.authority.rotate()
        for name in self.leafs:
            self._issue(name)
        self._touch("roots:")
        return web.Response()

    def renew(self, name: str) -> None:
        """At about half of its life the agent makes the next leaf."""
        self._on_loop(lambda: self._issue(name))

    def drop_old_roots(self) -> None:
        self._on_loop(lambda: (self.authority.drop_old_roots(), self._touch("roots:")))

    def change_authority(self, authority: ConsulAuthority | None = None, leafs: dict[str, Any] | None = None) -> None:
        """Whatever a test makes of it; everybody hears of it."""

        def apply() -> None:
            self.authority = authority or self.authority
            self.leafs.update(leafs or {})
            self._touch(*(["roots:"] if authority else []), *(f"leaf:{name}" for name in leafs or {}))

        self._on_loop(apply)

    async def _leader(self, request: web.Request, _: str, body: bytes) -> web.Response:
        return web.json_response("127.0.0.1:8300" if self.has_leader else "")


class Refused(Exception):
    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


def text(status: int, said: str) -> web.Response:
    return web.Response(status=status, text=said)


def lowered(said: dict[str, Any]) -> dict[str, Any]:
    """Consul takes the names of fields in any case."""
    return {key.lower(): value for key, value in said.items()}


def duration(said: str) -> float:
    digits = said.rstrip("hms")
    if said[len(digits) :] not in UNITS:
        raise Refused(400, "Invalid wait time")
    return float(digits) * UNITS[said[len(digits) :]]
