"""Do services on two hosts get, keep and lose their identities as documented, and talk with them?

Two network namespaces are the hosts: the CA lives on the first. Times are real, and short: certificates of four seconds.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.hosts import CLI, Host, Running, two_hosts, why_not
from tests.support import ROOT

_REASON = why_not()
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)

PORT = 8444
APP = """\
async def app(scope, receive, send):
    from meshlib import peer
    body = peer().spiffe_id.encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
"""
CALLER = """\
import asyncio, sys, meshlib
async def main():
    mesh = meshlib.Mesh.load("mesh.yaml", service=sys.argv[1])
    try:
        async with mesh.client() as http:
            answer = await http.get("http://orders/items")
            print("answer", answer.status_code, answer.text)
    except meshlib.errors.MeshError as error:
        print(type(error).__name__, error)
    finally:
        mesh.close()
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def first(hosts: tuple[Host, Host]) -> Host:
    return hosts[0]


@pytest.fixture
def second(hosts: tuple[Host, Host]) -> Host:
    return hosts[1]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A folder of its own for each test."""
    return str(request.node.name)


@contextlib.contextmanager
def serving(host: Host, folder: str, *more: object, port: int = PORT) -> Iterator[Running]:
    """A CA on the host; it is made if it isn't there."""
    if not (host.folder / folder).exists():
        host.meshlib("ca", "init", folder, "--trust-domain", "shop.internal")
    with host.running("-c", CLI, "ca", "serve", folder, "--listen", f"{host.address}:{port}", *more) as running:
        running.wait_for("serves on")
        yield running


def carried(first: Host, second: Host, ca: str, service: str, to: str = "token") -> Path:
    """A token from the CA's host to a file of the other one."""
    text = first.meshlib("ca", "token", ca, service).splitlines()[0]
    file = second.folder / to
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.write_text(text + "\n")
    return file


def log_of(host: Host, ca: str, *filters: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in host.meshlib("ca", "audit", ca, "--json", *filters).splitlines() if line.startswith("{")]


def serial_in(line: str) -> str:
    return re.findall("identity ([0-9a-f]+) until", line)[0]


def test_service_enrols_renews_and_comes_back_after_it_was_off_for_too_long(first: Host, second: Host, name: str) -> None:
    """By token, then by itself; switched off past its end it is refused with the way out, and a new token brings it back."""
    program = (
        ROOT / "tests" / "chaos" / "enrolled.py",
        f"https://{first.address}:{PORT}",
        f"{name}/state",
        f"{name}/token",
        "web",
    )
    with serving(first, name, "--ttl", "4s"):
        token = carried(first, second, name, "web", f"{name}/token")
        with second.running(*program) as running:
            serials = [serial_in(running.wait_for("identity")) for _ in range(3)]
        assert (len(set(serials)), token.exists()) == (3, False)

        # The cable is pulled for longer than a certificate lives: renewal fails meanwhile, and then there is nothing to renew.
        with second.running(*program) as running:
            running.wait_for("identity")
            second.link("down")
            running.wait_for("expired at", 15)
            second.link("up")
            with pytest.raises(AssertionError, match="never said"):
                running.wait_for("identity", 2)
        with second.running(*program) as restarted:
            said = restarted.wait_for("expired at")
            assert "only a valid one can be renewed" in said
            assert "meshlib ca token … web` on the CA's machine" in said
            carried(first, second, name, "web", f"{name}/token")
            again = serial_in(restarted.wait_for("identity"))
            assert again not in serials
            assert serial_in(restarted.wait_for("identity")) != again
    kinds = [entry.get("by") for entry in log_of(first, name, "--service", "web") if entry["event"] in {"issue", "renewal"}]
    assert (kinds[0], kinds.count("token"), kinds.count("renewal") >= 3) == ("token", 2, True)
    keys = [path for path in (first.folder / name).rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]
    assert {path.name for path in keys} == {"root.key", "issuer.key", "tokens.key"}
    assert "the chain is whole" in first.meshlib("ca", "audit", name, "--verify")


def test_stolen_token_is_good_for_one_and_the_other_hears_of_it(first: Host, second: Host, name: str) -> None:
    """Whoever is first; the log says from where, and a revocation takes back what was stolen."""
    url = f"https://{first.address}:{PORT}"
    with serving(first, name):
        token = carried(first, second, name, "orders", f"{name}/token")
        stolen = second.folder / name / "stolen"
        stolen.touch(mode=0o600)
        stolen.write_text(token.read_text())
        second.meshlib("ca", "enroll", stolen, "--ca", url, "--out", f"{name}/thief")
        said = second.meshlib("ca", "enroll", token, "--ca", url, "--out", f"{name}/orders", code=1)
        assert "was used already" in said
        assert "somebody else has that identity" in said
        assert not (second.folder / name / "orders" / "orders" / "svid.pem").exists()
        used, refused = log_of(first, name, "--event", "token.used", "--event", "token.refused")
        assert [used["source"], refused["source"], refused["reason"]] == [second.address, second.address, "token.used"]
        first.meshlib("ca", "revoke", name, "orders", "--reason", "keyCompromise")
        # What the thief has is worth nothing now: neither a renewal nor a call.
        program = (ROOT / "tests" / "chaos" / "enrolled.py", url, f"{name}/thief", f"{name}/none", "orders")
        with second.running(*program) as running:
            running.wait_for("IdentityWithdrawn")
        carried(first, second, name, "orders", f"{name}/token")
        second.meshlib("ca", "enroll", token, "--ca", url, "--out", f"{name}/orders")


def test_ca_of_another_fingerprint_gets_nothing(first: Host, second: Host, name: str) -> None:
    """An impostor at the CA's address: the token stays where it is and stays good."""
    first.meshlib("ca", "init", f"{name}-real", "--trust-domain", "shop.internal")
    token = carried(first, second, f"{name}-real", "orders", f"{name}/token")
    with serving(first, f"{name}-impostor"):
        said = second.meshlib("ca", "enroll", token, "--ca", f"https://{first.address}:{PORT}", "--out", f"{name}/orders", code=1)
        assert "no root with the fingerprint that stands in the token" in said
        assert "The token was not sent" in said
    assert [entry["event"] for entry in log_of(first, f"{name}-impostor")] == ["create", "issue"]
    assert token.exists()
    with serving(first, f"{name}-real"):
        second.meshlib("ca", "enroll", token, "--ca", f"https://{first.address}:{PORT}", "--out", f"{name}/orders")


def test_services_of_both_hosts_talk_with_what_they_enrolled_for(first: Host, second: Host, name: str) -> None:
    """A mesh serves on the one host and calls from the other: mTLS, and only who may is let in."""
    config = {
        "mesh": "shop",
        "secure": {
            "mode": "enforce",
            "trust_domain": "shop.internal",
            "identity": {"ca": f"https://{first.address}:{PORT}", "token": "token", "state": "state"},
        },
        "services": {
            "orders": {
                "listen": f"{first.address}:8443",
                "discover": {"static": [f"{first.address}:8443"]},
                "secure": {"allow": [{"name": "web reads", "from": ["web"], "methods": ["GET"]}]},
            },
            "web": {},
            "stranger": {},
        },
    }
    places = {}
    for host, service in ((first, "orders"), (second, "web"), (second, "stranger")):
        place = host.folder / name / service
        place.mkdir(parents=True, mode=0o700)
        (place / "mesh.yaml").write_text(json.dumps(config))
        (place / "shop.py").write_text(APP)
        (place / "call.py").write_text(CALLER)
        places[service] = Host(host.name, host.address, place)
    with serving(first, f"{name}-ca"):
        for service, place in places.items():
            carried(first, place, f"{name}-ca", service)
        with places["orders"].running("-c", CLI, "serve", "shop:app", "--service", "orders") as server:
            server.wait_for("Application startup complete")
            end = time.monotonic() + 20
            while True:
                with places["web"].running("call.py", "web") as caller:
                    said = caller.wait_for(lambda line: line.startswith(("answer", "ConnectFailed")))
                if said.startswith("answer") or time.monotonic() > end:
                    break
            assert said == "answer 200 spiffe://shop.internal/ns/default/sa/web\n"
            with places["stranger"].running("call.py", "stranger") as caller:
                assert caller.wait_for("answer").startswith("answer 403")
    assert not any((place.folder / "token").exists() for place in places.values())
