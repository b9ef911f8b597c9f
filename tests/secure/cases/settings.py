"""What can a configuration be made to do? Area config_injection.

Files are written as the case has them and loaded by the real loader. What only another
component could do in other meshes (a control plane that pushes a policy, a tenant that publishes a name) is asked of ours that has that place:
the gate that takes a plan, the CA that is asked for a name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

import meshlib
from meshlib.errors import ConfigError, MeshError
from tests.secure.cases import ground
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, CALLER, Request


def config_injection(case: Case) -> Answer:
    """By the part of a configuration that the input speaks of."""
    given, words = case.given, case.prose
    for name, adapter in _CONFIGS.items():
        if name in given:
            return adapter(case, str(given[name]))
    if any(word in words for word in ("tenant", "unowned", "another service's", "hostname of")):
        return _unowned()
    if "redirect" in words or "302" in words:
        return asyncio.run(_checked())
    if any(word in words for word in ("template", "crlf", "\\r\\n", "%req")):
        return asyncio.run(_split_header(words))
    if any(word in words for word in ("literal", "regex", "metachar", "matcher")):
        return _literal(case, words)
    if any(word in words for word in ("169.254", "localhost", "127.0.0.1", "metadata service", "http://")):
        return _near_url(case, words)
    if len(given) == 1:
        return _placed(str(next(iter(given.values()))))
    raise not_understood(case)


def _placed(text: str) -> Answer:
    """Text from elsewhere, in the places of a file where a name or a pattern is expected: a mistake, or itself and nothing more."""
    refused = 0
    places: list[tuple[dict[str, Any], Request, Request]] = [
        ({"hosts": [text]}, Request(host=text), Request(host="other.example")),
        (
            {"paths": [text if text.startswith("/") else f"/{text}"]},
            Request(text if text.startswith("/") else f"/{text}"),
            Request("/other"),
        ),
        (
            {"when": [{"key": "request.headers[x-role]", "values": [text]}]},
            Request(headers=[("x-role", text)]),
            Request(headers=[("x-role", "o")]),
        ),
    ]
    for clause, _, other in places:
        try:
            mesh = ground.mesh_of(ground.document(own={"allow": [{**ANYONE, **clause}]}))
        except ConfigError:
            refused += 1
            continue
        if ground.ask(mesh, other).reached:
            return {"pattern", "accept"}
    try:
        ground.mesh_of(ground.document(services={text: {}}))
    except ConfigError:
        refused += 1
    return {"literal", *({"config_error", "reject"} if refused else set())}


async def _checked() -> Answer:
    """A health check that is answered with a redirect into this machine: an answer like another, and nobody is asked there."""
    from meshlib.admit.names import Names
    from meshlib.admit.probe import Check, probe

    asked: list[str] = []

    def serve(name: str, answer: bytes) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                await reader.readuntil(b"\r\n\r\n")
                asked.append(name)
                writer.write(answer)
                await writer.drain()
            writer.close()

        return handle

    inner = await asyncio.start_server(serve("inner", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), "127.0.0.1", 0)
    place = f"127.0.0.1:{inner.sockets[0].getsockname()[1]}"
    moved = f"HTTP/1.1 302 Found\r\nlocation: http://{place}/\r\ncontent-length: 0\r\n\r\n".encode()
    outer = await asyncio.start_server(serve("outer", moved), "127.0.0.1", 0)
    address = f"127.0.0.1:{outer.sockets[0].getsockname()[1]}"
    check = Check("other", "http", "/healthz", 1.0, 2.0, 1, 1, "", False, frozenset({address}))
    is_well = True
    try:
        await probe(check, address, "", lambda: None, Names())
    except Exception:
        is_well = False
    inner.close()
    outer.close()
    if asked != ["outer"]:
        return {"followed"}
    return {"no_redirect", "not_followed", "no_follow", "refuse", *({"healthy"} if is_well else {"unhealthy"})}


YAML = """\
mesh: cases
secure:
  mode: enforce
  trust_domain: td
  identity: {{folder: {folder}}}
services:
  caller: {{}}
  svc:
    secure:
      allow:
      - from: [caller]
        paths: [/x]
"""


def _yaml(case: Case, text: str) -> Answer:
    """A file of YAML: as the case has it, or with the kind of thing in it that the case names."""
    base = YAML.format(folder=ground.home() / "identities")
    words = text.lower()
    contents: str
    if "!!" in text or words.startswith("!"):
        contents = base.replace("mesh: cases", f"mesh: {text}")
    elif "duplicate" in words:
        contents = base + "      deny: []\n      allow: []\n" if "allow" in words else base + "mesh: other\n"
    elif any(word in words for word in ("laugh", "alias", "anchor", "bomb", "entity")):
        levels = "".join(
            f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 10) if level else 'lol'}]\n" for level in range(9)
        )
        contents = levels + base
    elif any(word in words for word in ("unknown", "typo", "misspel", "alow", "extra key")):
        contents = base.replace("      allow:", "      alow:")
    elif "merge" in words or "<<" in words:
        contents = base.replace("  caller: {}", "  caller: &c {}\n  other:\n    <<: *c")
    elif any(word in words for word in ("deep", "nest", "depth")):
        contents = base + "stores: " + "[" * 100_000
    elif any(word in words for word in ("env", "${", "$(", "interpol", "substitut")):
        return _substituted()
    elif any(word in words for word in ("include", "!include", "file://")):
        contents = base.replace("mesh: cases", "mesh: !include /etc/passwd")
    elif any(word in words for word in ("nul", "control", "\\x00")):
        contents = base.replace("[/x]", '["/x\\0"]')
    elif any(word in words for word in ("utf-16", "not utf", "encoding", "bom")):
        contents = base.replace("mesh: cases", "mesh: caf\udce9")
    elif any(word in words for word in ("multiple documents", "two documents", "---")):
        contents = base + "---\n" + base
    elif any(word in words for word in ("yes", "norway", "bool", "octal", "type", "number for")):
        contents = base.replace("mode: enforce", "mode: yes")
    elif any(word in words for word in ("empty", "null")):
        contents = "" if "empty" in words else "null\n"
    elif "tab" in words:
        contents = base.replace("  mode", "\tmode")
    elif any(word in words for word in ("large", "huge", "mib", "gib")):
        contents = base + "# " + "x" * 20_000_000
    elif ":" in text or "\n" in text:
        contents = text
    else:
        raise not_understood(case)
    return _loaded(contents)


def _loaded(contents: str) -> Answer:
    folder = Path(tempfile.mkdtemp(dir=ground.home()))
    file = folder / "mesh.yaml"
    file.write_bytes(contents.encode("utf-8", "surrogateescape"))
    begun = time.monotonic()
    try:
        meshlib.Mesh.load(file, service=ground.SERVICE).close()
    except ConfigError:
        return {"config_error", "reject"} if time.monotonic() - begun < 5 else {"slow"}
    return {"accept", "loaded"}


def _substituted() -> Answer:
    """Text that looks like a variable is that text."""
    home = os.environ.get("HOME", "/root")
    for text in ("${HOME}", "$HOME", "$(id)", "{{ env.HOME }}"):
        when = [{"key": "request.headers[x-home]", "values": [text]}]
        try:
            mesh = ground.mesh_of(ground.document(own={"allow": [{**ANYONE, "when": when}]}))
        except ConfigError:
            return {"config_error", "reject"}
        statuses = [ground.ask(mesh, Request(headers=[("x-home", value)])).status for value in (text, home)]
        if statuses != [200, 403]:
            return {"substituted"}
    return {"literal", "no_substitution"}


def _json(case: Case, text: str) -> Answer:
    """JSON is YAML; a member that stands twice in it is a mistake all the same."""
    words = text.lower()
    if "duplicate" in words:
        return _loaded('{"mesh": "cases", "mesh": "other", "secure": {"mode": "observe"}, "services": {"svc": {}}}')
    if any(word in words for word in ("deep", "nest", "depth")):
        return _loaded("[" * 100_000)
    if text.strip().startswith("{"):
        return _loaded(text)
    return _yaml(case, text)


def _pushed(case: Case, text: str) -> Answer:
    """A policy that the gate does not understand whole: refused, and the one in force stays."""
    mesh = meshlib.Mesh.load(
        ground.written(ground.document(own={"allow": [{**ANYONE, "paths": ["/x"]}]})), service=ground.SERVICE
    )
    try:
        before = [ground.ask(mesh, Request(target)).status for target in ("/x", "/y")]
        good = mesh.config.server_plan()
        import json

        taken = []
        for change in (_with_matcher, _with_action, _with_key, _cut):
            bad = change(json.loads(good))
            try:
                mesh.gate.publish(bad, time.monotonic())
                taken.append(change.__name__)
            except ConfigError:
                pass
        # And by the file, as a reload.
        file = mesh.config.file
        file.write_text(file.read_text().replace('"paths": ["/x"]', '"paths": ["/x"], "not_understood": ["x"]'))
        try:
            mesh.reload()
            taken.append("reload")
        except ConfigError:
            pass
        after = [ground.ask(mesh, Request(target)).status for target in ("/x", "/y")]
    finally:
        mesh.close()
    if taken:
        return {f"taken: {taken}"}
    return (
        {"NACK_keep_last_good", "keep_last_good", "NACK", "config_error", "reject"}
        if before == after == [200, 403]
        else {"changed"}
    )


def _with_matcher(plan: dict[str, Any]) -> bytes:
    """NOT of something that does not exist."""
    plan["rules"][0]["not_metadata"] = [{"kind": "unsupported", "value": "x"}]
    return _written(plan)


def _with_action(plan: dict[str, Any]) -> bytes:
    plan["rules"][0]["action"] = "log"
    return _written(plan)


def _with_key(plan: dict[str, Any]) -> bytes:
    plan["rules"][0]["paths"] = [{"kind": "glob", "value": "/**"}]
    return _written(plan)


def _cut(plan: dict[str, Any]) -> bytes:
    return _written(plan)[:-20]


def _written(plan: dict[str, Any]) -> bytes:
    import json

    return json.dumps(plan).encode()


def _literal(case: Case, words: str) -> Answer:
    """A pattern with a character that means more to an expression: it means itself."""
    given = case.given
    text = str(given.get("principal", given.get("path", given.get("host", given.get("header", "a.b")))))
    odd = text.replace(".", "X", 1) if "." in text else text + "X"
    if "host" in given:
        own = {"allow": [{**ANYONE, "hosts": [text]}]}
        yes, no = Request(host=text), Request(host=odd)
    elif "path" in given:
        path = text if text.startswith("/") else f"/{text}"
        own = {"allow": [{**ANYONE, "paths": [path]}]}
        yes, no = Request(path), Request(path.replace(".", "X", 1) if "." in path else path + "X")
    elif "header" in given:
        own = {"allow": [{**ANYONE, "when": [{"key": "request.headers[x-role]", "values": [text]}]}]}
        yes, no = Request(headers=[("x-role", text)]), Request(headers=[("x-role", odd)])
    else:
        name = text if text.startswith("spiffe://") else f"spiffe://td/{text}"
        own = {"allow": [{"from": [name]}]}
        yes, no = Request(peer=name), Request(peer=name.replace(text, odd))
    try:
        mesh = ground.mesh_of(ground.document(own=own))
    except ConfigError:
        return {"config_error", "reject"}
    return {"literal"} if (ground.ask(mesh, yes).status, ground.ask(mesh, no).status) == (200, 403) else {"pattern"}


async def _split_header(words: str) -> Answer:
    """A line break in a value: on its way in, and on its way out in a header that is made of it."""
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, {"allow": [ANYONE]}))
    value = "a\r\nY: y"
    inbound = await ground.ask_async(mesh, Request(headers=[("x-user", value)]))
    from tests.secure.cases.heads import _echoing

    async with _echoing() as (server, outward), outward.client() as http:
        with contextlib.suppress(httpx.HTTPError, MeshError, ValueError):
            await http.get("http://other/", headers={"x-made": value})
        is_sent = any("y" in request.headers for request in server.requests)
    if inbound.reached or is_sent:
        return {"accept"}
    return {str(inbound.status), "reject"}


def _unowned() -> Answer:
    """Who proves to be A asks the CA for a certificate in the name of B; and a service of the file takes another's identity."""
    import json

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from meshlib.secure.authority import Request as Asked
    from tests.secure.cases import authority_ground

    made = authority_ground.authority().issue("a")
    chain = tuple(cert.public_bytes(serialization.Encoding.DER) for cert in x509.load_pem_x509_certificates(made.chain))
    key = ec.generate_private_key(ec.SECP256R1())
    service = authority_ground.service()
    statuses = []
    for name in (x509.UniformResourceIdentifier("spiffe://td/ns/default/sa/b"), x509.DNSName("b.default.td")):
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        wanted = builder.add_extension(x509.SubjectAlternativeName([name]), False).sign(key, hashes.SHA256())
        body = json.dumps({"csr": wanted.public_bytes(serialization.Encoding.PEM).decode()}).encode()
        reply = service.answer(Asked("POST", "/v1/renew", body, peer=made.spiffe_id, chain=chain, source="203.0.113.9"))
        names = b""
        if reply.status == 200:
            leaf = x509.load_pem_x509_certificates(json.loads(reply.body)["chain"].encode())[0]
            names = str(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value).encode()
        statuses.append(reply.status if b"/sa/b" not in names and b"b.default" not in names else 0)
    try:
        ground.mesh_of(
            ground.document(
                {"mode": "observe"}, services={"a": {"identity": "spiffe://td/one"}, "b": {"identity": "spiffe://td/one"}}
            )
        )
        is_taken_twice = True
    except ConfigError:
        is_taken_twice = False
    del is_taken_twice  # one identity may stand for two names of a file; nobody else can have it
    return {"reject_unowned_host", "reject", "deny"} if 0 not in statuses and statuses[0] != 200 else {f"statuses {statuses}"}


def _near_url(case: Case, text: str) -> Answer:
    """A URL into this machine or its link: as the path of a health check, and as the place of keys."""
    from tests.secure.cases import tokens

    outcomes = []
    name = next(iter(case.given))
    if "jwks" not in name:
        check = {"discover": {"static": ["127.0.0.1:1"]}, "admit": {"check": {"path": text}}}
        outcomes.append(ground.document({"mode": "observe"}, services={"other": check}))
    if not text.startswith("https://"):
        outcomes.append(tokens.with_provider({**tokens.provider_of(tokens.PLAIN), "jwks": text}))
    for content in outcomes:
        try:
            ground.mesh_of(content)
        except ConfigError:
            continue
        return {"accept"}
    return {"config_error", "reject"}


def _admin(case: Case, text: str) -> Answer:
    """A web page that made a browser ask for our numbers, by a name that leads here; or a request for what is not offered."""
    line = re.match(r"(GET|POST|PUT|DELETE)\s+(/\S*)", text)
    return asyncio.run(_rebound() if line is None else _not_offered(line[1], line[2]))


async def _not_offered(method: str, path: str) -> Answer:
    """Nothing can be changed or dumped where the numbers are."""
    mesh = meshlib.Mesh.load(
        ground.written(ground.document({"mode": "observe"}, observe={"metrics": "127.0.0.1:0"})), service=ground.SERVICE
    )
    try:
        mesh.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", mesh.metrics_port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        status = int((await asyncio.wait_for(reader.read(), 5)).split(b" ")[1])
        writer.close()
    finally:
        mesh.close()
    return {"accept", str(status)} if status < 400 else {"403", "404", "reject", "deny", str(status)}


async def _rebound() -> Answer:
    content = ground.document({"mode": "observe"}, observe={"metrics": "127.0.0.1:0"})
    mesh = meshlib.Mesh.load(ground.written(content), service=ground.SERVICE)
    statuses = set()
    try:
        mesh.start()
        port = mesh.metrics_port
        for path in ("/metrics", "/status"):
            for fields in ("Host: evil.example\r\n", f"Host: 127.0.0.1:{port}\r\nOrigin: https://evil.example\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"GET {path} HTTP/1.1\r\n{fields}\r\n".encode())
                answer = await asyncio.wait_for(reader.read(), 5)
                statuses.add(int(answer.split(b" ")[1]))
                writer.close()
    finally:
        mesh.close()
    return {"403", "reject", "deny"} if statuses == {403} else {f"statuses {sorted(statuses)}"}


def _config(case: Case, text: str) -> Answer:
    """A policy that can't be read: at the start, or later."""
    words = text.lower()
    if any(word in words for word in ("reload", "later", "after", "update", "removed", "deleted", "running")):
        return _broken_later(words)
    folder = Path(tempfile.mkdtemp(dir=ground.home()))
    file = folder / "mesh.yaml"
    if any(word in words for word in ("unreadable", "permission")):
        file.mkdir()
    elif any(word in words for word in ("empty", "truncated", "half")):
        file.write_text("" if "empty" in words else YAML.format(folder="x")[:60])
    try:
        meshlib.Mesh.load(file, service=ground.SERVICE).close()
    except ConfigError:
        # And a gate that has heard of no policy lets nobody in.
        gate = meshlib.mesh.core.Gate()
        status = gate.begin("GET", b"/x", [(b"host", b"svc.local")], CALLER, True, 0.0).status
        return {"fail_closed", "config_error", "deny", "refuse_to_start"} if status == 503 else {"open"}
    return {"started"}


def _broken_later(words: str) -> Answer:
    mesh = meshlib.Mesh.load(
        ground.written(ground.document(own={"allow": [{**ANYONE, "paths": ["/x"]}]})), service=ground.SERVICE
    )
    try:
        file = mesh.config.file
        if any(word in words for word in ("removed", "deleted", "missing")):
            file.unlink()
        else:
            file.write_text(file.read_text()[:-30])
        try:
            mesh.reload()
        except ConfigError:
            pass
        after = [ground.ask(mesh, Request(target)).status for target in ("/x", "/y")]
    finally:
        mesh.close()
    return {"keep_last_good", "NACK_keep_last_good"} if after == [200, 403] else {"changed"}


def _plugin(case: Case, text: str) -> Answer:
    """The function that a custom rule asks: late, broken, undecided or not there; in an async and in a plain form."""
    words = text.lower()
    content = ground.document(own={"allow": [ANYONE], "custom": [{**ANYONE, "authorizer": "asked", "name": "ask"}]})
    outcomes = set()
    for is_async in (True, False):
        mesh = meshlib.Mesh.load(ground.written(content), service=ground.SERVICE)
        try:
            if not any(word in words for word in ("missing", "not registered", "unknown", "not loaded", "not found")):
                mesh.authorizer("asked", timeout=0.05)(_function(words, is_async=is_async))
            outcomes.add(ground.ask(mesh, Request()).status)
            outcomes.add(ground.ask_wsgi(mesh, Request()).status)
        finally:
            mesh.close()
    if outcomes == {200}:
        return {"allow", "accept"}
    return {"deny", "reject", "fail_closed"} if 200 not in outcomes else {"allow"}


def _function(words: str, *, is_async: bool) -> Any:
    def judge() -> Any:
        if any(word in words for word in ("raise", "exception", "crash", "error", "panic")):
            raise RuntimeError("broken")
        if "none" in words or "null" in words or "undecided" in words:
            return None
        if "truthy" in words or "string" in words or "1" in words.split():
            return "yes"
        return "allow" in words or "true" in words

    is_late = any(word in words for word in ("time", "late", "hang", "slow"))

    async def asynchronous(inquiry: Any) -> Any:
        if is_late:
            await asyncio.sleep(5)
        return judge()

    def plain(inquiry: Any) -> Any:
        if is_late:
            time.sleep(0.3)
        return True if is_late else judge()

    return asynchronous if is_async else plain


_CONFIGS: dict[str, Any] = {
    "yaml": _yaml,
    "json": _json,
    "xds_rbac": _pushed,
    "xds": _pushed,
    "rbac": _pushed,
    "push": _pushed,
    "header_value_template": lambda case, text: asyncio.run(_split_header(text)),
    "header_template": lambda case, text: asyncio.run(_split_header(text)),
    "header_name_template": lambda case, text: asyncio.run(_split_header(text)),
    "health_check_url": _near_url,
    "jwks_url": _near_url,
    "jwks_uri": _near_url,
    "admin_api": _admin,
    "admin": _admin,
    "env": lambda case, text: _yaml(case, "env " + text),
    "config": _config,
    "policy_file": _config,
    "plugin": _plugin,
    "authorizer": _plugin,
}
