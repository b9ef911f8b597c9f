"""By which keys are tokens judged, and whence do they come? Area jwks.

Key sets are served by a real HTTPS server on loopback and fetched by the real store into the gate of a mesh; its clock is moved by hand. Of
each key that should not count, a token that was signed with it is shown to the gate, so that what is said to be ignored is.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import meshlib
from meshlib.errors import ConfigError, MeshError
from meshlib.secure.jwks import KeySource, KeyStore
from tests.secure.cases import ground, pki, tokens
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE

PROVIDER = "iss"


def jwks(case: Case) -> Answer:
    """By the key that says what is wrong."""
    given, words = case.given, case.prose
    for name in ("jwks_url", "jwks_uri", "url", "uri"):
        if name in given:
            return asyncio.run(_at(str(given[name]), case))
    if "jwk" in given:
        return _of_a_key(case, given["jwk"])
    if "jwks" in given or "keys" in given:
        return asyncio.run(_of_a_set(case, given.get("jwks", {"keys": given.get("keys")})))
    if "jwks_fetch" in given:
        return asyncio.run(_failing(case, str(given["jwks_fetch"]).lower(), given))
    if any(
        "bad_signature" in name or "bad signature" in name or ("known_kid_" in name and "unknown" not in name) for name in given
    ):
        return asyncio.run(_unknown(1000, is_known=True))
    if any("unknown_kid" in name or "unknown kid" in name for name in given):
        number = next(int(value) for name, value in given.items() if "unknown" in name and str(value).isdigit())
        return asyncio.run(_unknown(number))
    if any(
        word in words
        for word in (
            "size",
            "mib",
            "kib",
            "redirect",
            "slow",
            "hang",
            "timeout",
            "self-signed",
            "tls",
            "certificate",
            "gzip",
            "status",
        )
    ):
        return asyncio.run(_served_badly(case, given, words))
    raise not_understood(case)


# ------------------------------------------------------------------------------------------------ a store and its server


@dataclass
class Server:
    """What the server of the keys does next, and how often it was asked."""

    body: bytes = b""
    status: int = 200
    headers: str = ""
    delay: float = 0.0
    asked: int = 0
    port: int = 0


@dataclass
class World:
    mesh: meshlib.Mesh
    store: KeyStore
    server: Server
    offset: float = 0.0
    others: list[str] = field(default_factory=list)

    def status_of(self, token: str) -> int:
        """What the gate answers a caller with this token; 0: come in."""
        fields = [(b"host", b"svc.local"), (b"authorization", b"Bearer " + token.encode())]
        entry = self.mesh.gate.begin("GET", b"/x", fields, ground.CALLER, True, time.monotonic(), wall=time.time())
        status, wanted = entry.status, entry.wants_keys
        entry.finish(200, time.monotonic())
        if wanted:
            self.store.nudge(wanted)
        return int(status)

    async def pass_time(self, seconds: float, step: float = 30.0) -> None:
        """Let time go by, with the store looking as often as it does."""
        end = self.offset + seconds
        while self.offset < end:
            self.offset = min(end, self.offset + step)
            await self.store.look()
            await self.store.settled()


@contextlib.asynccontextmanager
async def _world(policy: dict[str, Any], *, certificate: dict[str, Any] | None = None, url: str = "") -> AsyncIterator[World]:
    server = Server(body=json.dumps({"keys": [tokens.jwk("rsa", "k1")]}).encode())
    issuer = None if certificate and "self" in certificate else pki.authority("of the keys")
    shown = pki.leaf(
        {"dns": ["localhost"], "eku": ["serverAuth"], **{k: v for k, v in (certificate or {}).items() if k != "self"}}, issuer
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    file = ground.home() / "keys.pem"
    file.write_bytes(shown.pem + shown.key)
    context.load_cert_chain(file)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            server.asked += 1
            await asyncio.sleep(server.delay)
            head = (
                f"HTTP/1.1 {server.status} x\r\ncontent-length: {len(server.body)}\r\n{server.headers}connection: close\r\n\r\n"
            )
            writer.write(head.encode() + server.body)
            await writer.drain()
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    place = url or f"https://localhost:{server.port}/jwks.json"
    provider = {**tokens.provider_of(policy), "jwks": {"url": place, "local": True}}
    mesh = meshlib.Mesh.load(
        ground.written(ground.document({"jwt": {PROVIDER: provider}}, {"allow": [ANYONE], "jwt": {"require": ["/*"]}})),
        service=ground.SERVICE,
    )

    def trusting() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.load_verify_locations(cadata=pki.authority("of the keys").pem.decode())
        return made

    world: World
    allowed = frozenset() if url else frozenset({"localhost"})
    store = KeyStore(
        [KeySource(PROVIDER, url=place, issuer=provider["issuer"])],
        mesh.gate,
        mesh.keeper,
        allowed=allowed,
        context=trusting,
        clock=lambda: time.monotonic() + world.offset,
    )
    world = World(mesh, store, server)
    try:
        yield world
    finally:
        listener.close()
        mesh.close()


async def _fetched(world: World) -> bool:
    await world.store.first()
    return world.store.stats()[0]["error"] == ""


# ------------------------------------------------------------------------------------------------ fetching


async def _failing(case: Case, words: str, given: dict[str, Any]) -> Answer:
    """No keys can be had: from the beginning, or for some time."""
    async with _world(case.policy) as world:
        if "after" in words or "then" in words:
            assert await _fetched(world) and world.status_of(tokens.valid()) == 0
        _break(world.server, words)
        age = pki.seconds_of(str(given.get("age", "0s")).lstrip("+") or "0s")
        if "after" in words:
            await world.pass_time(max(age, 1.0), step=max(age / 20, 60.0))
        else:
            await _fetched(world)
        forged = world.status_of(tokens.issued({"alg": "RS256", "kid": "k1"}, tokens.CLAIMS, "rsa:attacker"))
        good = world.status_of(tokens.valid())
    if forged == 0:
        return {"accept"}
    if good == 0:
        return {"accept", "stale", "serve_stale", "use_stale", "keep_last_good"}
    return {"reject_all", "reject", str(good)}


def _break(server: Server, words: str) -> None:
    status = re.search(r"\b([45]\d\d)\b", words)
    server.status = int(status[1]) if status else 500
    server.body = (
        b"{}" if "{}" in words else b"not json" if "json" in words or "malformed" in words or "html" in words else server.body
    )
    if "{}" in words or "json" in words or "malformed" in words or "html" in words:
        server.status = 200


async def _served_badly(case: Case, given: dict[str, Any], words: str) -> Answer:
    """Bodies too large, redirects, servers that hang or prove to be nobody: the fetch fails, and changes nothing."""
    certificate: dict[str, Any] | None = None
    if "self" in words:
        certificate = {"self": True}
    elif "expired" in words:
        certificate = {"not_after": "-1h", "not_before": "-2h"}
    elif any(word in words for word in ("wrong name", "wrong host", "mismatch", "other name")):
        certificate = {"dns": ["other.example"]}
    async with _world(case.policy, certificate=certificate) as world:
        server = world.server
        size = re.search(r"([\d.]+)\s*(k|m|g)i?b", words)
        if "redirect" in words:
            target = str(given.get("redirect", "https://localhost/"))
            server.status, server.headers = 302, f"location: {target}\r\n"
        elif size and "redirect" not in words:
            count = int(float(size[1]) * {"k": 1024, "m": 1024**2, "g": 1024**2}[size[2]])
            server.body = server.body[:-1] + b"," + json.dumps("x").encode() + b":" + json.dumps("y" * count).encode() + b"}"
        elif "gzip" in words or "compress" in words:
            server.headers = "content-encoding: gzip\r\n"
        elif status := re.search(r"\b([3-5]\d\d)\b", words):
            server.status = int(status[1])
        patience = 0.3 if any(word in words for word in ("slow", "hang", "timeout")) else 5.0
        server.delay = 2.0 if patience < 1 else 0.0
        with mock.patch("meshlib.secure.fetch.PATIENCE", patience):
            is_good = await _fetched(world)
        accepted = world.status_of(tokens.valid()) == 0
    return {"accept"} if is_good or accepted else {"fetch_error", "reject", "abort"}


async def _at(url: str, case: Case) -> Answer:
    """A place that nobody should be sent to: refused when it is configured, or when it is asked."""
    provider = {**tokens.provider_of(case.policy), "jwks": url}
    try:
        ground.mesh_of(tokens.with_provider(provider))
    except ConfigError:
        return {"config_error", "reject"}
    try:
        with mock.patch("meshlib.secure.fetch.PATIENCE", 0.5):
            async with _world(case.policy, url=url) as world:
                is_good = await _fetched(world)
    except MeshError:
        return {"config_error", "reject"}
    return {"accept"} if is_good else {"fetch_error", "reject"}


async def _unknown(number: int, *, is_known: bool = False) -> Answer:
    """So many tokens a second with keys that nobody knows (or with bad signatures by one that is known), for half a minute."""
    async with _world({**tokens.PLAIN}) as world:
        assert await _fetched(world)
        # The first half minute belongs to the fetch at the start.
        await world.pass_time(31)
        before = world.server.asked
        for second in range(30):
            for each in range(min(number, 1000) // 10):
                world.status_of(
                    tokens.issued({"alg": "RS256", "kid": f"u{second}-{each}"}, tokens.CLAIMS, "rsa:attacker")
                    if each == 0 and not is_known
                    else _named("k1" if is_known else f"u{second}-{each}")
                )
            await world.pass_time(0.999, step=1.0)
        asked = world.server.asked - before
        is_usable = world.status_of(tokens.valid()) == 0
    if not is_usable or asked > 1:
        return {f"{asked} fetches"}
    return {"<=1 fetch / 30 s", "bounded", *({"no_fetch", "0 fetches"} if asked == 0 else set())}


def _named(kid: str) -> str:
    """A token with a key's name of its own; its signature is never looked at."""
    header = tokens.encoded(json.dumps({"alg": "RS256", "kid": kid}).encode())
    return f"{header}.{tokens.encoded(tokens.written(tokens.CLAIMS))}.{tokens.encoded(bytes(256))}"


# ------------------------------------------------------------------------------------------------ keys


async def _of_a_set(case: Case, found: Any) -> Answer:
    """A set in place of one that was good."""
    document = found.encode() if isinstance(found, str) and found.strip().startswith(("{", "[")) else None
    if document is None and isinstance(found, str):
        twice = json.dumps(tokens.jwk("rsa", "k1"))
        documents = {
            "same kid": json.dumps({"keys": [tokens.jwk("rsa", "k1"), {**tokens.jwk("rsa", "attacker"), "kid": "k1"}]}),
            "duplicate kid": json.dumps({"keys": [tokens.jwk("rsa", "k1"), {**tokens.jwk("rsa", "attacker"), "kid": "k1"}]}),
            "duplicate": f'{{"keys": [], "keys": [{twice}]}}',
            "empty": '{"keys": []}',
            "null": '{"keys": null}',
            "no keys": "{}",
            "list": f"[{twice}]",
            "nest": '{"keys": ' + "[" * 1000 + "]" * 1000 + "}",
            "many": json.dumps({"keys": [{**tokens.jwk("rsa", "k1"), "kid": f"k{number}"} for number in range(2000)]}),
            "html": "<html></html>",
        }
        text = next((text for word, text in documents.items() if word in found.lower()), None)
        if text is None:
            raise not_understood(case)
        document = text.encode()
    document = document or json.dumps(found).encode()
    async with _world(case.policy) as world:
        assert await _fetched(world) and world.status_of(tokens.valid()) == 0
        world.server.body = document
        await world.pass_time(700, step=350)
        status = world.status_of(tokens.valid())
        forged = world.status_of(tokens.issued({"alg": "RS256", "kid": "k1"}, tokens.CLAIMS, "rsa:attacker"))
        has_failed = world.store.stats()[0]["error"] != ""
    if forged == 0:
        return {"accept", "use_last"}
    if status == 0:
        return {"keep_last_good", "fetch_error", "stale", "reject"} if has_failed else {"accept"}
    return {"reject_all", "revoke", "reject", "revoked", "ignore_key", "ignore_keys", str(status)}


def _of_a_key(case: Case, found: Any) -> Answer:
    """One key that should not count, beside a good one."""
    made = _sketched(found) if isinstance(found, dict) else _described(str(found).lower())
    if made is None:
        raise not_understood(case)
    key, sign = made
    mesh = ground.mesh_of(tokens.with_provider(tokens.provider_of({**tokens.PLAIN, **case.policy})))
    good = {**tokens.jwk("rsa", "good"), "kid": "good"}
    document = json.dumps({"keys": [key, good]}).encode()
    try:
        ignored = mesh.gate.keys(PROVIDER, document)
    except (ConfigError, ValueError):
        return {"reject", "fetch_error", "ignore_keys"}
    try:
        is_good = _status(mesh, tokens.issued({"alg": "RS256", "kid": "good"}, tokens.CLAIMS, "rsa:good")) == 0
        token = sign()
        is_believed = token is not None and _status(mesh, token) == 0
    finally:
        mesh.gate.keys(PROVIDER, json.dumps({"keys": tokens.keys_for("rsa:k1")}).encode())
    if is_believed:
        return {"accept", "use_key"}
    if not is_good:
        return {"takes_others_along"}
    return {"ignore_key", "reject"} if ignored else {"reject"}


def _status(mesh: meshlib.Mesh, token: str) -> int:
    fields = [(b"host", b"svc.local"), (b"authorization", b"Bearer " + token.encode())]
    entry = mesh.gate.begin("GET", b"/x", fields, ground.CALLER, True, time.monotonic(), wall=time.time())
    status = int(entry.status)
    entry.finish(200, time.monotonic())
    return status


Sign = Callable[[], str | None]


def _signed(kind: str, name: str, alg: str, kid: str) -> Sign:
    return lambda: tokens.issued({"alg": alg, "kid": kid}, tokens.CLAIMS, f"{kind}:{name}")


def _sketched(sketch: dict[str, Any]) -> tuple[dict[str, Any], Sign] | None:
    """A key as it is sketched, with all that the sketch leaves out, and a token that it would verify."""
    kind, kid = sketch.get("kty"), str(sketch.get("kid", "k1"))
    if kind == "oct":
        secret = b"k" * 32
        key = {**sketch, "k": base64.urlsafe_b64encode(secret).rstrip(b"=").decode()}
        header, payload = json.dumps({"alg": "HS256", "kid": kid}).encode(), tokens.written(tokens.CLAIMS)
        import hashlib
        import hmac

        signed = f"{tokens.encoded(header)}.{tokens.encoded(payload)}"
        token = f"{signed}.{tokens.encoded(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"
        return key, lambda: token
    # What is there without a kind is taken for what its other members say.
    base = "ec" if kind == "EC" or "crv" in sketch else "ed25519" if kind == "OKP" else "rsa"
    model = tokens.jwk(base, "sketched")
    key = {
        **{name: value for name, value in model.items() if name not in ("use", "kid")},
        **{k: v for k, v in sketch.items() if v != ".."},
    }
    if "kty" not in sketch:
        key.pop("kty", None)
    key["kid"] = kid
    alg = {"ec": "ES256", "rsa": "RS256", "ed25519": "EdDSA"}[base]
    if "alg" not in sketch:
        key.pop("alg", None)
    for name in [name for name, value in sketch.items() if value is None]:
        key.pop(name, None)
    return key, _signed(base, "sketched", alg, kid)


def _described(words: str) -> tuple[dict[str, Any], Sign] | None:
    """A key that is only spoken of."""
    size = re.search(r"(\d{3,5})\s*-?\s*bit", words)
    if "rsa" in words and size:
        name = f"weak-{size[1]}"
        return tokens.jwk("rsa", name), _signed("rsa", name, "RS256", name)
    if "exponent" in words or re.search(r"\be\s*=\s*\d", words):
        digits = re.search(r"(?:e\s*=\s*|exponent\s*)(\d+)", words)
        exponent = int(digits[1]) if digits else 1
        key = {**tokens.jwk("rsa", "sketched"), "e": tokens._integer(exponent)}
        return key, lambda: tokens.issued({"alg": "RS256", "kid": "sketched"}, tokens.CLAIMS, "rsa:sketched")
    if "curve" in words and ("not on" in words or "off" in words or "invalid" in words):
        key = tokens.jwk("ec", "sketched")
        key["y"] = tokens.encoded(bytes(31) + b"\x05")
        return key, _signed("ec", "sketched", "ES256", "sketched")
    for curve in ("p-224", "p-192", "secp256k1"):
        if curve in words:
            return {**tokens.jwk("ec", "sketched"), "crv": curve.upper() if curve[0] == "p" else curve}, _signed(
                "ec", "sketched", "ES256", "sketched"
            )
    for mark, members in (("enc", {"use": "enc"}), ("none", {"alg": "none"}), ("hs256", {"alg": "HS256"})):
        if mark in words:
            return {**tokens.jwk("rsa", "sketched"), **members}, _signed("rsa", "sketched", "RS256", "sketched")
    if "private" in words:
        return {**tokens.jwk("rsa", "sketched"), "d": "AQAB"}, _signed("rsa", "sketched", "RS256", "sketched")
    if "symmetric" in words or "oct" in words:
        return _sketched({"kty": "oct", "k": "..", "kid": "k1"})
    if "x5c" in words:
        return {"kty": "RSA", "kid": "sketched", "x5c": ["MIIB"]}, _signed("rsa", "sketched", "RS256", "sketched")
    return None
