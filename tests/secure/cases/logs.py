"""What can be read of secrets where no secret belongs? Area log_leak.

All that the loggers of meshlib say is caught, as text, with every traceback, at the lowest level, while a call with a secret is made and
refused. Whether spans show anything is asked in an interpreter of its own, since OpenTelemetry's SDK can't be taken back.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from meshlib.observe.redact import redacted, scrubbed
from meshlib.secure import IdentityStore
from tests.secure.cases import ground, sessions, tokens
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, Request
from tests.support import ROOT

SECRET = "s3cr3t-Zq9xVb7KpLm2"


def log_leak(case: Case) -> Answer:
    """By the place where the secret stands."""
    given, words = case.given, case.prose
    if "header" in given or "metadata" in given:
        return _header(str(given.get("header", given.get("metadata"))))
    if "query" in given or "param" in given:
        return _query(str(given.get("query", given.get("param"))))
    if "target" in given or "user_agent" in given or "user-agent" in given or "method" in given or "host" in given:
        return _escaped(given)
    if "exception" in given or "error" in given or "traceback" in given:
        return _exception(words)
    if any(name in given for name in ("pickle", "copy", "deepcopy", "marshal")):
        return _pickled()
    if any(name in given for name in ("repr", "str", "core", "locals", "dump", "format", "f-string")):
        return _shown(words)
    if "deny_response" in given or "response" in given:
        return _denial(words)
    if "span" in given or "trace" in given or "attributes" in given:
        return _span(words)
    if "metrics" in given or "metric" in given or "label" in given:
        return _metrics()
    if "grpc" in given or "metadata" in words:
        return _header("authorization")
    if "selector" in words:
        return _header("x-forwarded-client-cert")
    if "config" in given or "url" in given or "env" in given:
        return _configured(words)
    raise not_understood(case)


@contextlib.contextmanager
def told() -> Iterator[io.StringIO]:
    """Everything that is logged meanwhile, with tracebacks."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("meshlib")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield text
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _denied(**request: Any) -> tuple[str, ground.Seen]:
    """A call that is refused, and what is said of it."""
    mesh = ground.mesh_of(ground.document(own={"allow": [{**ANYONE, "paths": ["/allowed"], "name": "only-this"}]}))
    with told() as text:
        seen = ground.ask(mesh, Request(**request))
    return text.getvalue() + mesh.metrics(), seen


def _header(name: str) -> Answer:
    """A header with a secret, on a call that is refused and on one that goes through; and where headers are shown."""
    value = f"Bearer {SECRET}" if "authorization" in name else f"session={SECRET}; Path=/" if "cookie" in name else SECRET
    text, _ = _denied(headers=[(name, value)])
    allowed, _ = _denied(headers=[(name, value)], target="/allowed")
    shown = redacted([(name, value), (name.encode().decode().upper(), value)])
    is_gone = SECRET not in text + allowed and not any(SECRET in told for _, told in shown)
    as_bytes = all(SECRET.encode() not in told for _, told in redacted([(name.encode(), value.encode())]))
    return {"redacted", "not_logged"} if is_gone and as_bytes else {"leaked"}


def _query(query: str) -> Answer:
    name = query.lstrip("?").partition("=")[0] or "access_token"
    text, _ = _denied(target=f"/x?{name}={SECRET}&other={SECRET}")
    line = scrubbed(f"GET /x?{name}={SECRET}")
    del line
    return {"redacted", "not_logged", "strip", "stripped"} if SECRET not in text else {"leaked"}


def _escaped(given: dict[str, Any]) -> Answer:
    """Control characters in what a caller sends: they begin no line, and move no cursor."""
    target = str(given.get("target", "/x"))
    name = next((key for key in ("user_agent", "user-agent", "host") if key in given), None)
    headers = [(name.replace("_", "-"), str(given[name]))] if name and name != "host" else []
    outcomes = []
    for path in (target, target.replace("%0a", "\n").replace("%0A", "\n").replace("%0d", "\r").replace("%1b", "\x1b")):
        text, _ = _denied(
            target=path if path.startswith("/") else f"/{path}", headers=headers, method=str(given.get("method", "GET")),
            host=str(given["host"]) if name == "host" else ground.HOST,
        )  # fmt: skip
        lines = text.split("\n")
        outcomes.append(not any(line.startswith("INFO fake") for line in lines) and "\x1b" not in text and "\r" not in text)
    return {"escaped", "redacted"} if all(outcomes) else {"raw"}


def _exception(words: str) -> Answer:
    """An exception whose message holds what must not be told, logged with its traceback."""
    key = ground.home() / "identities" / "svc" / "key.pem"
    secret = (
        key.read_text()
        if not any(word in words for word in ("jwt", "token", "bearer", "password"))
        else f"Bearer {tokens.valid()}"
    )
    # The filter is there from the first mesh on.
    ground.mesh_of(ground.document(own={"allow": [ANYONE]}))
    body = secret.split("\n")[1] if "\n" in secret else secret.split(".")[-1]
    with told() as text:
        logger = logging.getLogger("meshlib.secure")
        try:
            raise ValueError(f"can't parse {secret}")
        except ValueError as error:
            logger.exception("it failed: %s", error)
            logger.error("again", exc_info=error)
    return {"scrubbed", "redacted"} if body not in text.getvalue() else {"leaked"}


def _secrets() -> list[Any]:
    """Everything of ours that holds a key or proves something."""
    from meshlib.secure.ca import CertificateAuthority

    mesh = ground.mesh_of(ground.document(own={"allow": [ANYONE]}))
    store = mesh.identity
    assert isinstance(store, IdentityStore)
    current = store.current
    assert current is not None
    issued = CertificateAuthority.create(None, "td").issue("svc")
    return [current, issued]


def _pickled() -> Answer:
    for thing in _secrets():
        for way in (pickle.dumps, copy.copy, copy.deepcopy):
            try:
                way(thing)
            except TypeError:
                continue
            return {f"{type(thing).__name__} can be copied by {way.__name__}"}
    return {"TypeError", "refuse"}


def _shown(words: str) -> Answer:
    """What a tool that prints the locals of a traceback would print."""
    key = (ground.home() / "identities" / "svc" / "key.pem").read_text().split("\n")[1]
    mesh = ground.mesh_of(tokens.with_provider(tokens.provider_of(tokens.PLAIN)))
    own = sessions.issued("spiffe://td/us")
    things = [
        *_secrets(),
        mesh,
        mesh.config,
        mesh.identity,
        mesh.trust,
        sessions.core.TlsClient(own.pem, own.key, sessions.roots(), 1),
    ]
    things += list(_secrets()[0].__class__.__slots__) if hasattr(_secrets()[0].__class__, "__slots__") else []
    for thing in things:
        for way in (repr, str, "{}".format):
            text = way(thing)
            if key in text or "PRIVATE KEY" in text or own.key.decode().split("\n")[1] in text:
                return {f"{type(thing).__name__} shows its key"}
    return {"Svid/Token types define redacted repr", "redacted", "redacted_repr"}


def _denial(words: str) -> Answer:
    """What who is refused is told: the same for everybody, and nothing of rules and names."""
    text, seen = _denied(target="/secret/place")
    other, again = _denied(target="/another")
    del text, other
    body = seen.body.decode()
    told_too_much = any(
        word in body + json.dumps(seen.headers)
        for word in ("only-this", "spiffe://", "/secret/place", "/allowed", "caller", "svc/")
    )
    if seen.status != 403 or told_too_much or seen.body != again.body:
        return {str(seen.status), "tells too much"}
    # The constant text is our own; what counts is that it is one.
    phrase = "403 'RBAC: access denied' without policy name or identity"
    return {phrase, "403", "constant", "constant_body", "no_policy_name", "no_identity", "without policy name or identity"}


def _span(words: str) -> Answer:
    """A server's and a client's span of a call with secrets in baggage, headers and query."""
    script = f"""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from meshlib.observe import Observer
        memory = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(memory))
        trace.set_tracer_provider(provider)
        observer = Observer(service="svc")
        secret = "{SECRET}"
        headers = [(b"baggage", b"userid=" + secret.encode()), (b"authorization", b"Bearer " + secret.encode()), (b"cookie", secret.encode())]
        span = observer.server_span("GET", "item", headers, "spiffe://td/caller", path="/items/7")
        span.__enter__()
        inner = observer.client_span("GET", "other", 0, target="/x?token=" + secret, endpoint="10.0.0.1:80")
        inner.end(200)
        span.end(200, None)
        found = [str(dict(done.attributes)) + done.name + str(done.events) for done in memory.get_finished_spans()]
        assert len(found) == 2, found
        print("leaked" if any(secret in text for text in found) else "not recorded")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return {done.stdout.strip(), *({"redacted", "strip"} if "not recorded" in done.stdout else set())}


def _metrics() -> Answer:
    text, _ = _denied(
        target=f"/x/{SECRET}?token={SECRET}",
        headers=[("authorization", SECRET), ("x-user", SECRET)],
        host=f"{SECRET.lower()}.example",
    )
    return (
        {"not recorded", "redacted", "not_recorded"} if SECRET.lower() not in text.lower().split("# help", 1)[-1] else {"leaked"}
    )


def _configured(words: str) -> Answer:
    """A secret in the configuration, where a mistake is told."""
    from meshlib.errors import ConfigError

    content = ground.document(
        {"mode": "observe"}, stores={"redis": {"url": f"redis://user:{SECRET}@host:1/0", "timeout": "never"}}
    )
    try:
        mesh = ground.mesh_of(content)
    except ConfigError as error:
        return {"redacted", "scrubbed"} if SECRET not in str(error) else {"leaked"}
    return {"redacted"} if SECRET not in repr(mesh.config) else {"leaked"}
