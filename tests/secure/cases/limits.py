"""How much may be asked, and how long may a question take? Areas rate_limit and redos.

Limits are those of `inbound` in mesh.yaml, met by calls over the inbound way; the one that a store counts is the client's. Time for patterns is
measured, since that is what is attacked: the best of several, so that a busy machine does not fail it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import meshlib
from meshlib.errors import ConfigError, MeshError
from tests.secure.cases import ground
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, Request

CALLS = 5


# ------------------------------------------------------------------------------------------------ rate_limit


def rate_limit(case: Case) -> Answer:
    """More calls than are allowed, by somebody who tries not to be counted."""
    given, words = case.given, case.prose
    if "store" in given:
        return _store(case, str(given["store"]).lower())
    if "clock" in given:
        return _clock(str(given["clock"]).lower())
    key = str(given.get("key", given.get("by", ""))).lower()
    if not key:
        raise not_understood(case)
    by: Any
    if any(word in key for word in ("ip", "client", "address")):
        by = "client"
    elif any(word in key for word in ("identity", "peer", "principal", "spiffe", "caller")):
        by = "peer"
    elif "route" in key or "path" in key:
        by = "route"
    elif "header" in key or key.startswith("x-"):
        by = {"header": key.partition(":")[2].strip() or (key if key.startswith("x-") else "x-tenant")}
    elif "service" in key or "global" in key:
        by = "service"
    else:
        raise not_understood(case)
    is_nobody = by in ("peer", "client") and any(
        word in words for word in ("no identity", "anonymous", "without identity", "plaintext", "missing")
    )
    secure: dict[str, Any] = {"mode": "permissive" if is_nobody and by == "peer" else "enforce"}
    trusted = case.policy.get("trusted_cidrs")
    if trusted:
        secure["proxies"] = {"cidrs": trusted, "hops": int(case.policy.get("xff_trusted_hops", 1))}
    inbound = {"rate": [{"calls": CALLS, "per": "3600s", "burst": CALLS, "by": [by], "name": "limit"}]}
    mesh = meshlib.Mesh.load(
        ground.written(ground.document(secure, {"allow": [ANYONE]}, service={"inbound": inbound, "route": _routes(by)})),
        service=ground.SERVICE,
    )
    try:
        statuses = [ground.ask(mesh, _spoofed(number, by, words, is_nobody)).status for number in range(3 * CALLS)]
        name = _name_of_nobody(mesh)
    finally:
        mesh.close()
    passed = statuses.count(200)
    if passed > CALLS + 1:
        return {"unlimited", f"{passed} of {len(statuses)}"}
    found = {"limited", "429"} if 429 in statuses else {f"{statuses[-1]}"}
    if is_nobody and passed <= CALLS:
        # All who are nobody share one bucket, whatever it is called.
        found |= {"limited as 'anonymous' bucket", "anonymous_bucket", name}
    return found


def _routes(by: Any) -> list[dict[str, Any]]:
    return [{"name": "item", "match": {"path": {"template": "/items/{id}"}}}] if by == "route" else []


def _name_of_nobody(mesh: meshlib.Mesh) -> str:
    return next((str(row["peer"] or "anonymous") for row in mesh.gate.stats()), "anonymous")


def _spoofed(number: int, by: Any, words: str, is_nobody: bool) -> Request:
    """The next call of somebody who looks different each time."""
    headers: list[tuple[str, str]] = []
    target, source = "/x", "203.0.113.9"
    if by == "client":
        headers = [
            ("x-forwarded-for", f"198.51.100.{number}"),
            ("x-real-ip", f"198.51.100.{number}"),
            ("forwarded", f"for=198.51.100.{number}"),
        ]
        if "/64" in words or "ipv6" in words:
            source = f"2001:db8:1:2::{number + 1:x}"
        if "mapped" in words:
            source = "::ffff:203.0.113.9" if number % 2 else "203.0.113.9"
    elif by == "route":
        target = f"/items/{number}?x={number}"
    elif isinstance(by, dict):
        # Not there, empty, twice: what has no value must be counted, too.
        name = by["header"]
        headers = [] if "missing" in words or "absent" in words else [(name.upper() if number % 2 else name, "a")]
    peer = "" if is_nobody else "spiffe://td/caller"
    is_tls = not (is_nobody and by == "peer")
    return Request(target, headers=headers, peer=peer, is_tls=is_tls, source=source)


def _clock(words: str) -> Answer:
    """The wall clock jumps; the limit is counted by the other one."""
    jump = -3600.0 if "-" in words or "back" in words else 3600.0
    inbound = {"rate": [{"calls": CALLS, "per": "3600s", "burst": CALLS, "by": ["service"], "name": "limit"}]}
    results = []
    for offset in (0.0, jump):
        mesh = meshlib.Mesh.load(
            ground.written(ground.document(own={"allow": [ANYONE]}, service={"inbound": inbound})), service=ground.SERVICE
        )
        try:
            real = time.time
            statuses = [ground.ask(mesh, Request()).status for _ in range(CALLS - 2)]
            time.time = lambda real=real, offset=offset: real() + offset  # type: ignore[misc]
            try:
                statuses += [ground.ask(mesh, Request()).status for _ in range(CALLS)]
            finally:
                time.time = real  # type: ignore[misc]
        finally:
            mesh.close()
        results.append(statuses)
    return {"unchanged"} if results[0] == results[1] and 429 in results[0] else {"changed"}


def _store(case: Case, words: str) -> Answer:
    """The store that counts for all processes can't be had; each counts its own, as configured by default."""
    return asyncio.run(_without_store(case, words))


async def _without_store(case: Case, words: str) -> Answer:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    hanging = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    gone = hanging.sockets[0].getsockname()[1] if any(word in words for word in ("slow", "hang", "timeout")) else 1
    rate: dict[str, Any] = {"calls": CALLS, "per": "3600s", "burst": CALLS, "by": ["service"], "store": "redis"}
    for word in ("open", "closed", "local"):
        if case.policy.get("on_failure") == word:
            rate["on_failure"] = word
    other = {"discover": {"static": [f"127.0.0.1:{port}"]}, "admit": {"rate": [rate]}}
    content = ground.document(
        {"mode": "observe"}, services={"other": other}, stores={"redis": {"url": f"redis://127.0.0.1:{gone}/0"}}
    )
    mesh = meshlib.Mesh.load(ground.written(content), service=ground.SERVICE)
    passed = 0
    try:
        async with mesh.client() as http:
            for _ in range(3 * CALLS):
                try:
                    reply = await http.get("http://other/")
                    passed += reply.status_code == 200
                except MeshError:
                    pass
    finally:
        mesh.close()
        server.close()
        hanging.close()
    if passed == 0:
        return {"closed", "fail_closed", "deny"}
    if passed <= CALLS + 1:
        return {"local fallback limit", "local_fallback", "limited", "local"}
    return {"open", "fail_open"}


# ------------------------------------------------------------------------------------------------ redos


def redos(case: Case) -> Answer:
    """Text that would keep a backtracking engine busy, or a parser that goes back and forth."""
    given = case.given
    pattern = given.get("route_regex", given.get("regex", given.get("path_regex", given.get("pattern"))))
    if pattern is not None:
        return _pattern(str(pattern), str(given.get("input", "a" * 40 + "!")))
    for name, adapter in (("range_header", _range), ("range", _range), ("host", _host)):
        if name in given:
            return adapter(str(given[name]))
    if len(given) == 1:
        # Any other header or part of a request that is long and odd.
        name, value = next(iter(given.items()))
        return _field(str(name), str(value))
    raise not_understood(case)


def _pattern(pattern: str, text: str) -> Answer:
    """A rule's expression: refused when it is loaded, or judged in no time."""
    text = _grown(text)
    whole = pattern if pattern.startswith("/") else f"/{pattern}"
    try:
        mesh = ground.mesh_of(ground.document(own={"allow": [{**ANYONE, "path_regexes": [_grown(whole)]}]}))
    except ConfigError:
        return {"config_error", "reject"}
    elapsed = _quickest(
        lambda: mesh.gate.begin("GET", ("/" + text)[:8000].encode(), [(b"host", b"svc.local")], ground.CALLER, True, 0.0)
    )
    return {"<1ms", "linear", "accept"} if elapsed < 0.001 else {f"{elapsed * 1000:.1f} ms"}


def _grown(text: str) -> str:
    """`aaaa...[5000 bytes]` and `a x 5000`, written out."""
    found = re.fullmatch(r"(.+?)\.\.\.\[(\d+)[^\]]*\](.*)", text, re.DOTALL)
    return found[1][-1] * int(found[2]) + found[3] if found else text


def _quickest(work: Callable[[], object], tries: int = 5) -> float:
    times = []
    for _ in range(tries):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def _range(value: str) -> Answer:
    """A Range of thousands of parts: the mesh reads none, and hands on a field like any other, in no time."""
    mesh = ground.mesh_of(ground.document(own={"allow": [ANYONE]}))
    fields = [(b"host", b"svc.local"), (b"range", value.encode())]
    elapsed = _quickest(lambda: mesh.gate.begin("GET", b"/x", fields, ground.CALLER, True, 0.0).finish(200, 0.0))
    seen = ground.ask(mesh, Request(headers=[("range", value)]))
    found = {str(seen.status)} if not seen.reached else {"ignore", "accept", *({"strip"} if not seen.values("range") else set())}
    return found | ({"<1ms"} if elapsed < 0.001 else set()) if elapsed < 0.02 else {"slow"}


def _host(value: str) -> Answer:
    mesh = ground.mesh_of(ground.document(own={"allow": [ANYONE]}))
    fields = [(b"host", value.encode("latin-1"))]
    elapsed = _quickest(lambda: mesh.gate.begin("GET", b"/x", fields, ground.CALLER, True, 0.0))
    status = ground.ask(mesh, Request(host=value)).status
    quick = "<1ms" if elapsed < 0.001 else f">{elapsed * 1000:.1f}ms"
    return {f"{status}{quick}", str(status), quick, *({"reject"} if status >= 400 else {"accept"})}


def _field(name: str, value: str) -> Answer:
    mesh = ground.mesh_of(ground.document(own={"allow": [ANYONE]}))
    header = name.replace("_header", "").replace("_", "-").lower()
    if header in ("target", "path", "url"):
        target = value if value.startswith("/") else f"/{value}"
        elapsed = _quickest(
            lambda: mesh.gate.begin(
                "GET", target.encode("latin-1", "replace"), [(b"host", b"svc.local")], ground.CALLER, True, 0.0
            )
        )
        seen = ground.ask(mesh, Request(target))
    else:
        text = _grown(value)
        fields = [(b"host", b"svc.local"), (header.encode(), text.encode("latin-1", "replace"))]
        elapsed = _quickest(lambda: mesh.gate.begin("GET", b"/x", fields, ground.CALLER, True, 0.0))
        seen = ground.ask(mesh, Request(headers=[(header, text)]))
    if elapsed >= 0.02:
        return {f"{elapsed * 1000:.1f} ms"}
    quick = {"<1ms", f"{seen.status}<1ms"} if elapsed < 0.001 else set()
    return {"ignore", *ground.verdict(seen), *quick}
