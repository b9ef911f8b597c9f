"""Which path is authorised, and which one does the application get? path_authz, istio_profile, escaped_slash_action, app_view, grpc_path.

Policies become rules of a mesh.yaml: `deny_prefix` is the path and everything under it, `allow_jwt_on_exact` a path on which a token is
needed. The calls come with an identity, since these cases are about paths and not about callers.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import quote, unquote

from meshlib._native import core
from meshlib.errors import MeshError
from tests.secure.cases import ground, grpc_ground, over_sockets
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, Request
from tests.secure.cases.path_host import ASGI, rewriter

Rule = dict[str, Any]


# ------------------------------------------------------------------------------------------------ path_authz


def path_authz(case: Case, paths: str = "canonical") -> Answer:
    """A target under a policy: what the gate answers through the ASGI middleware."""
    given = case.input if isinstance(case.input, dict) else {"target": case.input}
    if not isinstance(given.get("target"), str) or not given.keys() <= {"target", "method", "host"}:
        raise not_understood(case)
    mesh = ground.mesh_of(ground.document({"paths": paths, **_providers(case.policy)}, own_of(case)))
    method, host = given.get("method", "GET"), given.get("host", ground.HOST)
    seen = ground.ask(mesh, Request(given["target"], method=method, host=host))
    if seen.reached:
        return "allow"
    if seen.status == 401 and seen.reason == "secure.jwt":
        return "needs_jwt"
    return {400: "400", 403: "deny", 307: f"307:{seen.headers.get('location')}"}.get(seen.status, str(seen.status))


_RULES = {
    "deny", "allow", "not_paths", "deny_prefix", "allow_prefix", "deny_regex", "allow_regex", "jwt_on", "allow_jwt_on_exact", "case", "methods",
}  # fmt: skip


def own_of(case: Case) -> dict[str, Any]:
    """A policy about paths as the section `secure` of the service."""
    policy = case.policy
    if not policy.keys() <= _RULES:
        raise not_understood(case)
    more: Rule = {"methods": policy["methods"]} if "methods" in policy else {}
    if policy.get("case") == "insensitive":
        more["case"] = "insensitive"
    own: dict[str, Any] = {}
    denied = [
        *_rules(policy.get("deny", []), "paths"),
        *_rules([path for prefix in policy.get("deny_prefix", []) for path in under(prefix)], "paths"),
        *_rules(policy.get("deny_regex", []), "path_regexes"),
    ]
    allowed = [
        *_rules(policy.get("allow", []), "paths"),
        *_rules([path for prefix in policy.get("allow_prefix", []) for path in under(prefix)], "paths"),
        *_rules(policy.get("allow_regex", []), "path_regexes"),
        *_rules(policy.get("not_paths", []), "not_paths"),
    ]
    if not allowed and policy.keys() & {"deny", "deny_prefix", "deny_regex", "jwt_on", "allow_jwt_on_exact"}:
        # A policy that only forbids.
        allowed = [dict(ANYONE)]
    own["deny"] = [{**rule, **more} for rule in denied]
    own["allow"] = [{**rule, **more} if rule.keys() != {"from"} else rule for rule in allowed]
    with_token = [*policy.get("jwt_on", []), *([policy["allow_jwt_on_exact"]] if "allow_jwt_on_exact" in policy else [])]
    if with_token:
        own["jwt"] = {"require": with_token}
    return own


def under(prefix: str) -> list[str]:
    """A path and everything under it, by whole segments."""
    return ["*"] if prefix == "/" else [prefix, prefix.rstrip("/") + "/*"]


def _rules(patterns: list[str], clause: str) -> list[Rule]:
    if not patterns:
        return []
    if "*" in patterns and clause == "paths":
        return [{**ANYONE, "paths": ["/*"]}]
    if clause == "path_regexes":
        return [{**ANYONE, clause: patterns}]
    # A path with a character that would be a query, a template or an escape is written as an expression.
    odd = [pattern for pattern in patterns if set("?#{}%") & set(pattern)]
    plain = [pattern for pattern in patterns if pattern not in odd]
    escaped = [re.escape(pattern).replace(r"\*", ".*").replace("%", "[%]") for pattern in odd]
    if clause == "not_paths":
        # Neither of both: one rule.
        both = {"not_paths": plain, "not_path_regexes": escaped}
        return [{**ANYONE, **{name: listed for name, listed in both.items() if listed}}]
    return [{**ANYONE, name: listed} for name, listed in (("paths", plain), ("path_regexes", escaped)) if listed]


def _providers(policy: dict[str, Any]) -> dict[str, Any]:
    """Somebody who could issue the token that is asked for."""
    if not policy.keys() & {"jwt_on", "allow_jwt_on_exact"}:
        return {}
    from tests.secure.cases import tokens

    return {"jwt": {"iss": tokens.provider_of({"issuer": "https://iss", "audiences": ["svc-a"]})}}


# ------------------------------------------------------------------------------------------------ parity with Istio and Envoy


def istio_profile(case: Case) -> Answer:
    """Istio's four documented normalisations."""
    profile = case.policy.get("normalize", case.policy.get("normalization"))
    if not isinstance(case.input, str) or profile is None:
        raise not_understood(case)
    return _normalised(case.input, profile, "KEEP_UNCHANGED", is_grpc=False)


def escaped_slash_action(case: Case) -> Answer:
    """Envoy's `path_with_escaped_slashes_action`."""
    given = case.input if isinstance(case.input, dict) else {"path": case.input}
    target, action = given.get("path", given.get("target")), case.policy.get("path_with_escaped_slashes_action")
    if not isinstance(target, str) or action is None:
        raise not_understood(case)
    return _normalised(target, case.policy.get("normalize", "NONE"), action, is_grpc=bool(given.get("grpc")))


def _normalised(target: str, profile: str, action: str, *, is_grpc: bool) -> str:
    kind, text = core.normalized_path(target, profile, action, is_grpc)
    if kind == "refused":
        return f"grpc_status:{text}" if is_grpc else text
    return f"{ {'path': 'path', 'redirect': '307'}[kind] }:{text}"


# ------------------------------------------------------------------------------------------------ app_view


def app_view(case: Case) -> Answer:
    """What the application sees; behind a rewriter in between, behind a proxy, and for scopes that are no requests.

    In process, and over raw sockets at every server that the case may mean.
    """
    given = case.given
    if "scope_type" in given:
        return _scope(case)
    target = given.get("target", given.get("path"))
    if not isinstance(target, str):
        raise not_understood(case)
    content = ground.document(own=own_of(case))
    mesh = ground.mesh_of(content)
    request = Request(target, method=given.get("method", "GET"))
    server = str(given.get("server", ""))
    rewrite = rewriter(given)
    if rewrite is not None:
        sides = [ground.verdict(_between(mesh, request, rewrite))]
        return sides + [ground.verdict(seen) for seen in over_sockets.ask_all(content, request, server, **given).values()]
    is_hop = "proxy" in server or "agent" in server
    sides = [_viewed(_in_process(mesh, request, server), is_hop=is_hop)]
    everywhere = [
        *over_sockets.ask_all(content, request, server).items(),
        *over_sockets.ask_ours(content, request, server).items(),
    ]
    # Without a raw path there is nothing that a hop could hand on.
    return sides + [
        _viewed(seen, is_hop=is_hop) for kind, seen in everywhere if not (is_hop and seen.reached and not seen.raw_path)
    ]


def _in_process(mesh: Any, request: Request, server: str) -> ground.Seen:
    if "waitress" in server:
        # It tells no raw path, cuts off fragments and takes leading slashes together.
        request = Request("/" + request.target.split("#")[0].lstrip("/"), method=request.method)
        return ground.ask_wsgi(mesh, request, has_raw=False)
    is_wsgi = any(word in server for word in ("wsgi", "gunicorn"))
    return ground.ask_wsgi(mesh, request) if is_wsgi else ground.ask(mesh, request)


def _viewed(seen: ground.Seen, *, is_hop: bool) -> set[str]:
    if not seen.reached or seen.path is None:
        return ground.verdict(seen)
    if seen.raw_path and unquote(seen.raw_path) != seen.path:
        return {f"app_sees:{seen.path} and {seen.raw_path}"}
    if is_hop:
        # What a hop that hands the call on puts on the wire: the canonical form, escaped again.
        return {f"upstream_target:{seen.raw_path}"}
    return {f"app_sees:{seen.path}", *ground.verdict(seen)}


def _between(mesh: Any, request: Request, rewrite: Any) -> ground.Seen:
    """mesh > rewriter > mesh > application, as a framework's middleware stands between `mesh.asgi` and an integration of it."""
    seen = ground.Seen(0)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.path = scope["path"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    inner = mesh.asgi(application)

    async def rewriter(scope: Any, receive: Any, send: Any) -> None:
        path = rewrite(scope["path"])
        await inner({**scope, "path": path, "raw_path": quote(path).encode()}, receive, send)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.status = message["status"]

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(mesh.asgi(rewriter)(ground.asgi_scope(request), receive, send))
    # A rewriter before the mesh: what it makes is what is judged.
    raw, _, query = request.target.partition("?")
    rewritten = rewrite(raw) + (f"?{query}" if query else "")
    first = ground.ask(mesh, Request(rewritten if rewritten.startswith("/") else f"/{rewritten}", method=request.method))
    return seen if seen.reached or not first.reached else first


def _scope(case: Case) -> Answer:
    kind = case.given["scope_type"]
    target = case.given.get("target", case.given.get("path", "/x"))
    mesh = ground.mesh_of(ground.document(own=own_of(case)))
    if kind == "websocket":
        return ground.verdict(ground.ask(mesh, Request(target, kind="websocket")))
    if kind == "http":
        return ground.verdict(ground.ask(mesh, Request(target, method=case.given.get("method", "GET"))))
    reached: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def nothing(*message: Any) -> Any:
        return {"type": "lifespan.startup"}

    try:
        asyncio.run(mesh.asgi(application)({"type": kind}, nothing, nothing))
    except MeshError:
        return {"refuse", "reject", "deny"}
    sides = [{"passthrough"} if reached == [kind] else {"refuse", "deny"}]
    if kind == "lifespan":
        # Under a policy that denies everything, each server has told its application of the start.
        asked = over_sockets.ask_all(ground.document(own={"allow": [ANYONE]}), Request())
        sides += [{"passthrough"} if (asked[each].scope or {}).get("is_started") else {"refuse", "deny"} for each in ASGI]
    return sides


# ------------------------------------------------------------------------------------------------ grpc_path


def grpc_path(case: Case) -> Answer:
    """A `:path` on the wire to a real gRPC server; its answer is the status of the call."""
    given = case.input if isinstance(case.input, dict) else {"path": case.input}
    path = given.get("path", given.get(":path", given.get("method")))
    rest = {name: value for name, value in case.policy.items() if name != "default"}
    if not isinstance(path, str) or not rest.keys() <= {"deny", "allow"}:
        raise not_understood(case)
    own: dict[str, Any] = {"deny": _rules(rest.get("deny", []), "paths"), "allow": _rules(rest.get("allow", []), "paths")}
    if case.policy.get("default") == "allow" or (not own["allow"] and "allow" not in rest and own["deny"]):
        own["allow"] = [dict(ANYONE)]
    content = ground.document(own=own, service={"protocol": "grpc", "discover": {"static": ["127.0.0.1:1"]}})
    raw = grpc_ground.Raw(grpc_ground.port_of(content))
    try:
        answer = raw.call(path)
    finally:
        raw.close()
    status = answer.status
    if status == "CANCELLED" or not status:
        # grpcio ended the stream before anybody was asked; this is what the interceptors say where a server asks them.
        status = grpc_ground.asked_directly(content, path)
    if status == "OK":
        return "allow"
    return {f"grpc_status:{status}", *({"deny"} if status == "PERMISSION_DENIED" else set())}
