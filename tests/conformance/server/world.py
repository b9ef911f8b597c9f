"""In which world do the servers of the conformance tests stand? An authority, some callers, tokens, and one policy for all modes."""

from __future__ import annotations

import base64
import json
import shutil
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.conformance.server.wire import context
from tests.support import TRUST_DOMAIN, identities, write_config

STOREFRONT = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/storefront"
STRANGER = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/stranger"
ISSUER = "https://id.shop.internal/"

# How many calls may be under way at once, how many wait for a place, and how many of one tenant come in.
IN_FLIGHT = 6
WAITING = 3
RATE = 5

RULES: dict[str, Any] = {
    "allow": [
        {"name": "everything", "from": ["storefront", "gateway"]},
        {"name": "numbers", "from": ["*"], "methods": ["GET"], "paths": ["/numbers"]},
        {"name": "public", "from": ["*"], "methods": ["GET"], "paths": ["/public", "/public/*"]},
    ],
    "deny": [{"name": "no-admin", "from": ["*"], "paths": ["/admin", "/admin/*"]}],
    "jwt": {"require": ["/token", "/token/*"]},
}


# For callers without identity, at the listener for them.
PUBLIC = [{"name": "shop-window", "from": ["*"], "methods": ["GET"], "paths": ["/window", "/window/*", "/admin/*"]}]


class World:
    """An embedded CA, its SVIDs, and where they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = identities(folder, "orders", "storefront", "stranger", "gateway")
        foreign = folder / "foreign"
        foreign.mkdir()
        identities(foreign, "storefront")
        bundle = self.svid("storefront") / "bundle.pem"
        self._callers: dict[str, ssl.SSLContext] = {
            **{name: context(self.svid(name)) for name in ("storefront", "stranger", "gateway")},
            # Of another CA, and without a certificate.
            "foreign": context(foreign / "identities" / "storefront", bundle=bundle),
            "nobody": context(None, bundle=bundle),
        }
        self._key = ec.generate_private_key(ec.SECP256R1())

    def caller(self, name: str) -> ssl.SSLContext:
        return self._callers[name]

    def svid(self, service: str) -> Path:
        return self.folder / "identities" / service

    def home(self, name: str) -> Path:
        """A folder for one server."""
        home = self.folder / name
        home.mkdir()
        return home

    def config(self, home: Path, mode: str, listeners: Mapping[str, int]) -> Path:
        """What the server in this folder goes by. `listeners` are the ports that it has beside its own."""
        if mode != "observe":
            shutil.copytree(self.folder / "identities", home / "identities")
        orders = {
            "secure": RULES,
            "admit": {"in_flight": IN_FLIGHT},
            "inbound": {
                "rate": [{"name": "tenants", "calls": RATE, "per": "1h", "by": [{"header": "x-tenant"}]}],
                "queue": WAITING / IN_FLIGHT,
                # Whoever waits does so until a behaviour lets somebody go.
                "codel": {"target": "20s", "interval": "30s"},
                # So that the numbers can be asked for when the house is full.
                "probes": ["/healthz", "/numbers"],
                "drain": {"wait": "700ms", "grace": "20s"},
                **({"probe": f"127.0.0.1:{listeners['probe']}"} if "probe" in listeners else {}),
                **({"public": {"listen": f"127.0.0.1:{listeners['public']}", "allow": PUBLIC}} if "public" in listeners else {}),
            },
            "route": [{"name": "items", "match": {"path": {"template": "/items/{id}"}}}, {"name": "rest"}],
        }
        file = write_config(home, {"orders": orders, "storefront": {}, "stranger": {}, "gateway": {}}, mode=mode)
        content = json.loads(file.read_text())
        people = {"issuer": ISSUER, "audiences": ["orders"], "algorithms": ["ES256"], "jwks": {"keys": [self._jwk()]}}
        content["secure"] |= {"jwt": {"people": people}, "proxies": {"identities": ["gateway"], "hops": 1}}
        file.write_text(json.dumps(content))
        return file

    def token(self, **claims: Any) -> str:
        """A good token, unless `claims` make another of it."""
        now = int(time.time())
        content = {"iss": ISSUER, "aud": "orders", "sub": "alice", "iat": now, "exp": now + 600, **claims}
        text = ".".join(_encoded(json.dumps(part).encode()) for part in ({"alg": "ES256", "kid": "one"}, content))
        r, s = decode_dss_signature(self._key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_encoded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def _jwk(self) -> dict[str, str]:
        numbers = self._key.public_key().public_numbers()
        x, y = (_encoded(value.to_bytes(32, "big")) for value in (numbers.x, numbers.y))
        return {"kty": "EC", "crv": "P-256", "kid": "one", "alg": "ES256", "use": "sig", "x": x, "y": y}


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
