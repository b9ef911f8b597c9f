"""What may a request's head make us believe? host_authz, method, header_authz, header_spoof, trace_ctx.

A head comes in over ASGI or WSGI as a server would hand it over. Where a case speaks of a
token, a real one is put in, since an attack with a worthless token would be refused for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

import meshlib
from meshlib.errors import ConfigError
from tests.secure.cases import ground, over_sockets, tokens
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, CALLER, PROXY, Request
from tests.support import Request as Received
from tests.support import Scripted, ok, scripted

OPEN: dict[str, Any] = {"allow": [ANYONE]}


# ------------------------------------------------------------------------------------------------ host_authz, method


def host_authz(case: Case) -> Answer:
    """A Host, or what pretends to be one."""
    given, policy = case.given, case.policy
    if not policy.keys() <= {"deny_hosts", "allow_hosts", *_PROXY_KEYS}:
        raise not_understood(case)
    own: dict[str, Any] = {"allow": [{**ANYONE, "hosts": policy["allow_hosts"]}] if "allow_hosts" in policy else [ANYONE]}
    if "deny_hosts" in policy:
        own["deny"] = [{**ANYONE, "hosts": policy["deny_hosts"]}]
    headers = _fields(given.get("headers", []))
    host: Any = given.get("host", given.get(":authority"))
    if isinstance(host, list):
        headers += [("host", str(value)) for value in host]
        host = None
    elif ":authority" in given and "host" in given:
        # A server that hands over both, as two fields.
        headers.append(("host", str(given[":authority"])))
    headers += [(name, str(value)) for name, value in given.items() if _is_field(name)]
    mesh = ground.mesh_of(ground.document(_proxies(policy), own))
    seen = ground.ask(mesh, _request(given, headers=headers, host=host))
    return ground.verdict(seen)


def method(case: Case) -> Answer:
    """A method, proper or not. An empty list of denials is a policy that allows everything."""
    given, policy = case.given, case.policy
    if not isinstance(given.get("method"), str) or not policy.keys() <= {
        "deny",
        "allow",
        "methods",
        "deny_methods",
        "allow_methods",
    }:
        raise not_understood(case)
    own: dict[str, Any] = {}
    if "allow_methods" in policy:
        own["allow"] = [{**ANYONE, "methods": policy["allow_methods"]}]
    elif "allow" in policy:
        own["allow"] = [{**ANYONE, "paths": policy["allow"]}]
    elif policy:
        own["allow"] = [ANYONE]
    if policy.get("deny_methods"):
        own["deny"] = [{**ANYONE, "methods": policy["deny_methods"]}]
    elif policy.get("deny"):
        own["deny"] = [{**ANYONE, "paths": policy["deny"], **({"methods": policy["methods"]} if "methods" in policy else {})}]
    mesh = ground.mesh_of(ground.document(own=own))
    return ground.verdict(ground.ask(mesh, Request(given.get("target", "/x"), method=given["method"])))


# ------------------------------------------------------------------------------------------------ header_authz


def header_authz(case: Case) -> Answer:
    """Rules on headers, and where a token may stand."""
    given, policy = case.given, case.policy
    if policy.get("jwt"):
        return _token_in(case)
    kinds = {"deny_header": ("deny", "values"), "allow_header": ("allow", "values"), "deny_header_not": ("deny", "not_values"),
             "allow_header_not": ("allow", "not_values")}  # fmt: skip
    if not policy or not policy.keys() <= kinds.keys():
        raise not_understood(case)
    own: dict[str, list[Any]] = {}
    for name, conditions in policy.items():
        action, clause = kinds[name]
        when = [{"key": f"request.headers[{header.lower()}]", clause: _listed(value)} for header, value in conditions.items()]
        own.setdefault(action, []).append({**ANYONE, "when": when})
    own.setdefault("allow", [ANYONE])
    mesh = ground.mesh_of(ground.document(own=own))
    return ground.verdict(_asked(mesh, given))


def _token_in(case: Case) -> Answer:
    """A valid token, at a place or in a form that may not count."""
    given, policy = case.given, case.policy
    places = [_place(name) for name in policy.get("from", ["authorization"])]
    provider = {**tokens.provider_of(tokens.PLAIN), "from": places}
    mesh = ground.mesh_of(ground.document({"jwt": {"iss": provider}}, {**OPEN, "jwt": {"require": ["/*"]}}))
    valid = tokens.valid()
    seen = _asked(mesh, _with_token(given, valid))
    found = ground.verdict(seen)
    if seen.reached:
        found |= {"scheme_ok", "accept"}
    return found


def _place(name: str) -> dict[str, str]:
    kind, _, rest = name.partition(":")
    if kind in ("cookie", "query") and rest:
        return {kind: rest}
    if name == "cookie":
        return {"cookie": "token"}
    if name == "query":
        return {"query": "access_token"}
    return {"header": name, **({"prefix": "Bearer "} if name == "authorization" else {})}


def _with_token(value: Any, token: str) -> Any:
    """The input with a real token for each that is only hinted at."""
    if isinstance(value, dict):
        return {key: _with_token(item, token) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_token(item, token) for item in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"eyJ[\w.\-…]*", token, value)
    if text != value:
        return text
    text = re.sub(r"(?i)(bearer\s+)([a-z0-9]\w*)", lambda found: found[1] + token, value)
    return re.sub(r"((?:access_)?token=)[^&;\s]*", lambda found: found[1] + token, text)


def _asked(mesh: meshlib.Mesh, given: dict[str, Any]) -> ground.Seen:
    if "environ" in given:
        return ground.ask_wsgi(mesh, Request(given.get("target", "/x")), given["environ"])
    headers = _fields(given.get("headers", []))
    headers += [(name, str(value)) for name, value in given.items() if _is_field(name) or name in ("authorization", "cookie")]
    target = given.get("target", "/x")
    if "query" in given:
        target += "?" + str(given["query"]).lstrip("?")
    request = Request(target, headers=headers)
    return ground.ask_wsgi(mesh, request) if "wsgi" in str(given.get("server", "")) else ground.ask(mesh, request)


# ------------------------------------------------------------------------------------------------ header_spoof

_PROXY_KEYS = {"trusted_proxies", "xff_trusted_hops", "trusted_cidrs"}


def header_spoof(case: Case) -> Answer:
    """Headers that say who the caller is, where it comes from, or what another proxy found out.

    In process, and over raw sockets at every server that the case may mean.
    """
    given, policy = case.given, case.policy
    known = {*_PROXY_KEYS, "xfcc", "deny_cidrs", "allow_cidrs", "require_tls"}
    if not policy.keys() <= known:
        raise not_understood(case)
    trailers = given.get("chunked_trailer", given.get("trailer", given.get("trailers")))
    if trailers is not None:
        return asyncio.run(_trailers(_fields(trailers), str(given.get("server", ""))))
    headers = _fields(given.get("headers", []))
    if not headers:
        raise not_understood(case)
    connection = [value for name, value in headers if name.lower() == "connection"]
    if connection:
        return _hop_by_hop(headers, connection[0])
    own = _by_address(policy)
    is_plain = _is_plain(given)
    mode = "enforce" if not is_plain or policy.get("require_tls") else "permissive"
    xfcc = {"xfcc": policy["xfcc"].lower()} if "xfcc" in policy else {}
    content = ground.document({"mode": mode, **_proxies(policy), **xfcc}, own)
    mesh, server = ground.mesh_of(content), str(given.get("server", ""))
    request = _request(given, headers=headers)
    sides = [ground.ask_wsgi(mesh, request) if "wsgi" in server else ground.ask(mesh, request)]
    sides += over_sockets.ask_all(content, request, server).values()
    sides += over_sockets.ask_ours(content, request, server).values()
    return [_heard(seen, headers) for seen in sides]


def _heard(seen: ground.Seen, headers: list[tuple[str, str]]) -> set[str]:
    found = ground.verdict(seen)
    if not seen.reached:
        # Our own door tells a plain caller so, before anything is taken for a request.
        return found | ({"deny"} if b"mutual TLS" in seen.body else set())
    if any(name.lower() in ("x-forwarded-for", "x-real-ip", "forwarded") for name, _ in headers):
        found.add(f"client_ip:{seen.client}")
    return found - {"accept"} | _what_became(seen, headers)


def _what_became(seen: ground.Seen, headers: list[tuple[str, str]]) -> set[str]:
    """Of each header that was sent: gone, as it was, added to, or ours."""
    found: set[str] = set()
    for name, value in headers:
        there = seen.values(name)
        text = ",".join(there)
        if not there:
            found.add("strip")
        elif value not in text:
            uris = re.findall(r"URI=[^;,]+", text)
            found |= {"set", *(f"set:{uri}" for uri in uris), f"set:{text}"}
        elif text == value:
            found |= {"accept", "forward", "keep", "passthrough", "pass", f"forward:{value}"}
        else:
            added = re.findall(r"URI=[^;,]+", text.replace(value, "", 1))
            found |= {"append", "append_forward", "forward", "forward_and_append", "accept", *(f"append:{uri}" for uri in added)}
    # One that got through is not made good by another that did not.
    return found - {"strip"} if found & {"accept", "append", "set"} else found


def _hop_by_hop(headers: list[tuple[str, str]], connection: str) -> list[set[str]]:
    """A Connection field that names what we set: on the way in the header that we write, on the way out what we send."""
    named = [name.strip().lower() for name in connection.split(",")]
    ours = [name for name in named if name.startswith("x-mesh-") or name == "x-forwarded-client-cert"]
    content = ground.document({"xfcc": "sanitize_set"}, OPEN)
    fields = [(name, value) for name, value in headers if name.lower() != "connection"]
    names = ", ".join(["close", "x-forwarded-client-cert", "x-mesh-deadline-ms", *named])
    late = Request(headers=[("connection", names), ("x-mesh-deadline-ms", "0")])
    usual = Request(headers=[*fields, ("connection", names)])
    mesh = ground.mesh_of(content)
    answers = [(ground.ask(mesh, usual), ground.ask(mesh, late))]
    for ask in (over_sockets.ask_all, over_sockets.ask_ours):
        answers += zip(ask(content, usual).values(), ask(content, late).values(), strict=True)
    inside = [seen.reached and seen.values("x-forwarded-client-cert") != [] and gone.status == 504 for seen, gone in answers]
    if ours:
        inside.append(asyncio.run(_survives_outside(names)))
    return [{"mesh_header_survives"} if survives else {"mesh_header_lost"} for survives in inside]


async def _survives_outside(names: str) -> bool:
    async with _echoing() as (server, mesh), mesh.client() as http:
        await http.get("http://other/", headers={"connection": names})
        return "x-mesh-deadline-ms" in server.requests[-1].headers


@contextlib.asynccontextmanager
async def _echoing() -> AsyncIterator[tuple[Scripted, meshlib.Mesh]]:
    """A server that the mesh knows as the service `other`."""

    async def answer(server: Scripted, request: Received) -> bytes:
        return ok()

    async with scripted(answer) as server:
        services = {"other": {"discover": {"static": [server.address]}}}
        mesh = ground.mesh_of(ground.document({"mode": "observe"}, services=services))
        yield server, mesh


async def _trailers(trailers: list[tuple[str, str]], server: str) -> set[str]:
    """Headers are frozen when authorised: what comes later is not among them. Over a socket to a real server."""
    from tests.secure.cases import servers

    seen: dict[str, list[tuple[str, str]]] = {}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(0)
        seen["headers"] = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, OPEN))
    lines = "".join(f"{name}: {value}\r\n" for name, value in trailers)
    head = "POST /x HTTP/1.1\r\nhost: svc.local\r\ntransfer-encoding: chunked\r\n\r\n"
    found: set[str] = set()
    # Behind the back of a handler that reads the body, and so early that a parser has them before anybody is called.
    for kind, pause in [(kind, pause) for kind in servers.kinds_of(server) for pause in (0.05, None)]:
        seen.clear()
        async with servers.running(kind, mesh, application) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            begin, end = f"{head}1\r\nA\r\n".encode(), f"0\r\n{lines}\r\n".encode()
            writer.write(begin + end if pause is None else begin)
            if pause is not None:
                await asyncio.sleep(pause)
                writer.write(end)
            answer = await asyncio.wait_for(reader.read(200), 5)
            writer.close()
        names = {name.lower().replace("_", "-") for name, _ in seen.get("headers", [])}
        visible = any(name.lower().replace("_", "-") in names for name, _ in trailers)
        found |= (
            {"visible_to_app"} if visible else {"not_visible_to_app", "strip", *({"400"} if b" 400 " in answer[:40] else set())}
        )
    return {"visible_to_app"} if "visible_to_app" in found else found


def _proxies(policy: dict[str, Any]) -> dict[str, Any]:
    """Whom a policy believes about where a call comes from."""
    proxies: dict[str, Any] = {}
    if policy.get("trusted_proxies"):
        proxies["identities"] = policy["trusted_proxies"]
    if policy.get("trusted_cidrs"):
        proxies["cidrs"] = policy["trusted_cidrs"]
    if policy.get("xff_trusted_hops"):
        proxies["hops"] = policy["xff_trusted_hops"]
    return {"proxies": proxies} if proxies else {}


def _by_address(policy: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {
        "allow": [{**ANYONE, "remote_ip_blocks": policy["allow_cidrs"]}] if "allow_cidrs" in policy else [ANYONE]
    }
    if "deny_cidrs" in policy:
        own["deny"] = [{**ANYONE, "remote_ip_blocks": policy["deny_cidrs"]}]
    return own


def _is_plain(given: dict[str, Any]) -> bool:
    return any(word in str(given.get("peer", "")).lower() for word in ("plain", "none", "no tls", "http"))


def _request(given: dict[str, Any], *, headers: list[tuple[str, str]], host: str | type[...] | None = ...) -> Request:  # type: ignore[valid-type]
    """The request that an input's general keys describe: who sends it, from where, and how."""
    peer = str(given.get("peer", ""))
    identity = CALLER
    if peer.startswith(("mtls:", "spiffe:")):
        identity = peer.removeprefix("mtls:")
    elif peer in ("trusted", "proxy", "trusted_proxy"):
        identity = PROXY
    is_plain = _is_plain(given)
    fields = {"host": ground.HOST if host is ... else host}
    if "host" not in given and ":authority" not in given and "http_version" in given:
        # The head is whole as it is given.
        fields = {"host": None}
    return Request(
        given.get("target", "/x"),
        method=given.get("method", "GET"),
        headers=headers,
        peer="" if is_plain else identity,
        is_tls=not is_plain,
        source=given.get("peer_ip", given.get("source", "203.0.113.9")),
        http_version=str(given.get("http_version", "1.1")),
        **fields,
    )


def _fields(listed: Any) -> list[tuple[str, str]]:
    pairs = listed.items() if isinstance(listed, dict) else listed
    return [(str(name), str(value)) for name, value in pairs]


def _is_field(name: str) -> bool:
    return name.startswith("x-") or name in ("forwarded", "traceparent", "tracestate", "baggage", "b3", "uber-trace-id")


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


# ------------------------------------------------------------------------------------------------ trace_ctx

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def trace_ctx(case: Case) -> Answer:
    """A trace from outside: what the calls of the handler carry on, to a service and to a host outside the mesh."""
    given, policy = case.given, case.policy
    conditions = policy.get("allow_header", policy.get("deny_header"))
    if conditions:
        # Used as a condition of a rule.
        when = [{"key": f"request.headers[{name}]", "values": _listed(value)} for name, value in conditions.items()]
        others = [{"key": name, "values": _listed(value)} for name, value in conditions.items()]
        for clauses in (when, others):
            try:
                ground.mesh_of(ground.document(own={"allow": [{**ANYONE, "when": clauses}]}))
            except ConfigError:
                continue
            return "loaded"
        return "config_error"
    if policy and not policy.keys() <= {"sampled", "trusted"}:
        raise not_understood(case)
    fields = [(name, text) for name, value in given.items() if _is_field(name) for text in _listed(value)]
    fields += _fields(given.get("headers", []))
    if not fields:
        raise not_understood(case)
    return asyncio.run(_carried(fields, given))


async def _carried(fields: list[tuple[str, str]], given: dict[str, Any]) -> set[str]:
    names = {name.lower() for name, _ in fields}
    sent = fields if "traceparent" in names else [("traceparent", PARENT), *fields]
    async with _echoing() as (server, mesh), mesh.client() as http:
        inner: dict[str, str] = {}
        outer: dict[str, str] = {}

        async def handler() -> None:
            await http.get("http://other/")
            inner.update(server.requests[-1].headers)
            await http.get(f"http://{server.address}/")
            outer.update(server.requests[-1].headers)

        request = _request(given, headers=sent)
        seen = await ground.ask_async(mesh, request, handler)
    if not seen.reached:
        return ground.verdict(seen)
    found: set[str] = set()
    if "traceparent" in names:
        parent = next(value for name, value in fields if name.lower() == "traceparent")
        now = inner["traceparent"].split("-")
        is_same = parent.lower().split("-")[1:2] == [now[1]]
        found |= {"accept"} if is_same else {"new_trace"}
        if is_same and parent[53:55] in ("01", "03") and now[3] != "01":
            found |= {"unsampled", "sampled_ignored", "ignore_sampled", "drop_sampled"}
    if "tracestate" in names:
        members = [value for name, value in fields if name.lower() == "tracestate"]
        kept = inner.get("tracestate", "")
        found |= (
            {"accept"}
            if all(member.strip() in kept for member in members[0].split(",")[:1])
            else {"drop_tracestate", "drop", "strip"}
        )
    if "baggage" in names:
        found |= {"accept"} if "baggage" in inner else {"drop_baggage", "drop", "strip"}
        if "egress" in given:
            found = {"strip_on_egress", "strip"} if "baggage" not in outer else {"leaked"}
    if "x-request-id" in names:
        value = next(value for name, value in fields if name.lower() == "x-request-id")
        there = seen.values("x-request-id")
        found |= {"accept"} if there == [value] else {"strip", "drop"} if not there else {"regenerate"}
        if there and value not in there and not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", there[0]):
            found = {"passed"}
    for name in names & {"b3", "x-b3-traceid", "x-b3-sampled", "x-b3-flags", "uber-trace-id"}:
        found |= {"ignore", "strip"} if name not in inner else {"accept"}
    return found
