"""Are we who Consul's CA says, as long as it says so?"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from cryptography import x509
from meshlib_consul import ConnectSource, open_source
from meshlib_consul import connect as connect_module

import meshlib
from integrations.consul.tests.agents import ROTATION, StandInAgent
from integrations.consul.tests.consul_ca import ConsulAuthority
from meshlib._native import core
from meshlib.errors import ConfigError
from meshlib.secure import IdentityStore
from meshlib.secure.sources import open_plugin
from meshlib.testing import check_identity_source

PATIENCE = 10.0


def trust_domain_of(agent: Any) -> str:
    return str(json.loads(agent.call("GET", "/v1/agent/connect/ca/roots"))["TrustDomain"])


def id_of(agent: Any, service: str = "orders") -> str:
    return f"spiffe://{trust_domain_of(agent)}/ns/default/dc/dc1/svc/{service}"


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., ConnectSource]]:
    name = "agent" if "agent" in request.fixturenames else "standin"
    agent = request.getfixturevalue(name)
    made = list[ConnectSource]()

    def begin(spiffe_id: str = "", **settings: Any) -> ConnectSource:
        told = {"url": agent.url, "timeout": "2s", "wait": "1s", **settings}
        made.append(open_source(told, spiffe_id=spiffe_id or id_of(agent), trust_domain=""))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def until(what: Callable[[], Any], expected: Any = True, patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while (found := what()) != expected and not (expected is True and found):
        assert time.monotonic() < end, f"{found!r} never became {expected!r}"
        time.sleep(0.01)


def error_of(source: ConnectSource) -> str:
    try:
        source.load()
    except meshlib.IdentityError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def roots_in(bundle: bytes) -> int:
    return len(x509.load_pem_x509_certificates(bundle))


# ---------------------------------------------------------------- what it is


def test_the_identity_is_the_one_that_consul_gives(agent: Any, make: Callable[..., ConnectSource]) -> None:
    """Its SPIFFE ID, a key and the roots, in a form that TLS takes; unchanged, it is the same object, at once."""
    source = make()
    identity = source.load()
    assert (identity.spiffe_id, list(identity.bundles)) == (id_of(agent), [trust_domain_of(agent)])
    assert identity.key.startswith(b"-----BEGIN PRIVATE KEY-----")
    began = time.monotonic()
    assert all(source.load() is identity for _ in range(100))
    assert time.monotonic() - began < 0.5
    assert 0 < identity.not_after - time.time() < 80 * 3600


def test_two_services_prove_themselves_to_each_other(agent: Any, make: Callable[..., ConnectSource]) -> None:
    """A handshake in TLS 1.3 between two that have their certificates from Consul, and none with somebody from another cluster."""
    stores = [IdentityStore(make(id_of(agent, name)), mode="enforce") for name in ("orders", "storefront")]
    for store in stores:
        store.require(0.0)
    server, client = stores[0].server_tls(True), stores[1].client_tls
    assert client is not None
    assert peers(client, server, id_of(agent, "orders")) == (id_of(agent, "orders"), id_of(agent, "storefront"))
    other = ConsulAuthority()
    leaf = other.leaf("orders", 1)
    foreign = core.TlsServer(
        leaf["CertPEM"].encode(),
        leaf["PrivateKeyPEM"].encode(),
        {other.trust_domain: other.roots()["Roots"][0]["RootCert"].encode()},
        1,
        True,
    )
    with pytest.raises(meshlib.MeshError):
        peers(client, foreign, id_of(agent, "orders"))


def peers(client: core.TlsClient, server: core.TlsServer, expected: str) -> tuple[str | None, str | None]:
    """Who each of the two proved to be to the other, after a handshake in memory."""
    calling, called = core.HttpConnection(client, expected, "orders"), core.TlsConnection(server)
    flight = calling.open()
    while flight:
        _, answer, _ = called.receive(flight)
        flight, _ = calling.receive(bytearray(answer), len(answer))
    return calling.peer, called.peer


def test_the_mesh_finds_it_by_its_entry_point(standin: StandInAgent) -> None:
    """And by nothing else: a plugin is loaded only if the configuration names it."""
    spiffe_id = id_of(standin)
    made: Any = open_plugin("consul", {"url": standin.url}, spiffe_id=spiffe_id, trust_domain=trust_domain_of(standin))
    assert made.load().spiffe_id == spiffe_id
    made.close()


def test_another_name_than_the_configuration_says_is_told_with_what_to_write(
    agent: Any, make: Callable[..., ConnectSource]
) -> None:
    """The mesh's own form of a SPIFFE ID is not Consul's."""
    source = make("spiffe://shop.internal/ns/default/sa/orders")
    with pytest.raises(meshlib.IdentityError) as caught:
        source.load()
    assert f"says that the service orders is {id_of(agent)}" in str(caught.value)
    assert f"trust_domain: {trust_domain_of(agent)}" in caught.value.hint
    assert f"identity: {id_of(agent)}" in caught.value.hint


def test_it_conforms_to_what_sources_are_asked() -> None:
    """What a test can make of a system that issues by itself: a CA of the check's own, in Consul's answers."""

    class World:
        def __init__(self, spiffe_id: str) -> None:
            self.spiffe_id = spiffe_id
            self.agent = StandInAgent()
            self.made: ConnectSource | None = None

        def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
            blocks = [
                f"{block}-----END CERTIFICATE-----\n"
                for block in bundle.decode("utf-8", "replace").split("-----END CERTIFICATE-----\n")[:-1]
            ]
            roots = {
                "TrustDomain": "x",
                "Roots": [{"RootCert": block} for block in blocks or [bundle.decode("utf-8", "replace")]],
            }
            leaf = {"CertPEM": chain.decode("utf-8", "replace"), "PrivateKeyPEM": key.decode("utf-8", "replace")}
            authority = ConsulAuthority()
            authority.roots = lambda: roots  # type: ignore[method-assign]
            # Consul's roots and leafs are two questions, and a new leaf with the roots of before is a good identity, which the check
            # would take for the bad one: the source waits for both halves here, as at its start.
            if self.made is not None:
                self.made._leaf = self.made._roots = None
            self.agent.standin.change_authority(authority, {"checked": leaf})

        def source(self) -> ConnectSource:
            self.made = open_source({"url": self.agent.url, "wait": "1s"}, spiffe_id=self.spiffe_id, trust_domain="")
            return self.made

        def close(self) -> None:
            self.agent.close()

    checked = check_identity_source(World)
    assert len(checked) == 11, checked


# ---------------------------------------------------------------- what becomes of it


def test_a_new_leaf_is_in_force_when_the_agent_has_it(standin: StandInAgent, make: Callable[..., ConnectSource]) -> None:
    """Heard by the query that waits for it, and the store makes a generation of it."""
    source = make()
    store = IdentityStore(source, mode="enforce")
    first = store.require(0.0)
    began = time.monotonic()
    standin.standin.renew("orders")
    until(lambda: store.refresh(1.0))
    assert time.monotonic() - began < 0.9
    current = store.current
    assert current is not None
    assert (current.serial != first.serial, current.bundles) == (True, first.bundles)
    indexes = [query.get("index") for query in standin.standin.asked("/v1/agent/connect/ca/leaf/orders")]
    assert indexes[0] is None and None not in indexes[1:]


def test_a_rotation_of_the_root_is_taken_over_in_its_steps(agent: Any, make: Callable[..., ConnectSource]) -> None:
    """The new root beside the old one, and a new leaf by it; no step in between is an error to the store."""
    source = make()
    store = IdentityStore(source, mode="enforce")
    first = store.require(0.0)
    agent.rotate()
    trust_domain = trust_domain_of(agent)

    def is_over() -> bool:
        store.refresh(1.0)
        assert store.last_error is None
        current = store.current
        return current is not None and current.serial != first.serial and roots_in(current.bundles[trust_domain]) == 2

    until(is_over, patience=ROTATION)


def test_a_root_that_is_gone_counts_at_once(standin: StandInAgent, make: Callable[..., ConnectSource]) -> None:
    """What it signed is not believed any more."""
    source = make()
    source.load()
    standin.rotate()
    until(lambda: roots_in(source.load().bundles[trust_domain_of(standin)]), 2)
    standin.standin.drop_old_roots()
    until(lambda: roots_in(source.load().bundles[trust_domain_of(standin)]), 1)


def test_an_agent_that_dies_is_told_when_it_lasts_and_the_identity_stays(
    agent: Any, make: Callable[..., ConnectSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can stop the agent must not be able to stop everybody on its machine."""
    source = make()
    store = IdentityStore(source, mode="enforce")
    first = store.require(0.0)
    agent.kill()
    until(lambda: bool(source._trouble))
    assert (store.refresh(1.0), store.last_error, store.current) == (False, None, first)
    monkeypatch.setattr(connect_module, "NOTICE", 0.0)
    until(lambda: "can't be asked" in error_of(source))
    assert (store.refresh(2.0), store.current) == (False, first)


def test_another_cluster_under_the_same_address_is_refused(standin: StandInAgent, make: Callable[..., ConnectSource]) -> None:
    """As after a restart that forgot its CA: what we have stays, and it is told which name came."""
    source = make()
    first = source.load()
    standin.restart()
    until(lambda: "says that the service orders is spiffe://" in error_of(source))
    assert source._identity is first


@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "object", "no-index", "cut", "filtered", "redirect"])
def test_what_is_no_answer_changes_nothing(standin: StandInAgent, make: Callable[..., ConnectSource], fault: str) -> None:
    """And when it is over, what is new is heard."""
    source = make()
    first = source.load()
    standin.standin.fail(fault)
    until(lambda: bool(source._trouble) or source._error is not None)
    assert source._identity is first
    standin.standin.fail("")
    standin.standin.renew("orders")
    until(lambda: not error_of(source) and source.load().serial != first.serial)


@pytest.mark.parametrize(
    "change",
    [
        {"CertPEM": ""}, {"CertPEM": None}, {"PrivateKeyPEM": "-----BEGIN EC PRIVATE KEY-----\nsecret-word\n"}, {"PrivateKeyPEM": 7},
        {"ServiceURI": "spiffe://elsewhere/svc/orders"}, {"CertPEM": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
    ],
)  # fmt: skip
def test_half_of_an_identity_is_refused(
    standin: StandInAgent, make: Callable[..., ConnectSource], change: dict[str, Any]
) -> None:
    """It is told without a word of the key, and what was good stays."""
    source = make()
    first = source.load()
    standin.standin.change_authority(leafs={"orders": {**standin.standin.authority.leaf("orders", 99), **change}})
    until(lambda: error_of(source) != "")
    assert (source._identity is first, "secret-word" in error_of(source)) == (True, False)
    standin.standin.renew("orders")
    until(lambda: error_of(source), "")


@pytest.mark.parametrize("roots", [None, [], [{}], [{"RootCert": ""}], ["x"]])
def test_no_roots_at_all_are_no_reason_to_trust_nobody(
    standin: StandInAgent, make: Callable[..., ConnectSource], roots: Any
) -> None:
    """A CA that isn't ready says so; it withdraws nothing."""
    source = make()
    first = source.load()
    standin.standin.authority.roots = lambda: {"TrustDomain": "x", "Roots": roots}  # type: ignore[method-assign]
    standin.standin.change_authority(standin.standin.authority)
    until(lambda: error_of(source).startswith("IdentityError"))
    assert source._identity is first


def test_a_refused_token_is_told_at_once_at_the_start(
    standin: StandInAgent, make: Callable[..., ConnectSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing better would come of waiting; and the right one is taken when it is there."""
    spiffe_id = id_of(standin)
    standin.standin.token = "right"
    monkeypatch.setenv("OURS", "wrong")
    source = make(spiffe_id, token={"env": "OURS"}, timeout="5s")
    began = time.monotonic()
    assert "403" in error_of(source)
    assert time.monotonic() - began < 3.0
    monkeypatch.setenv("OURS", "right")
    until(lambda: error_of(source), "")


def test_the_start_waits_no_longer_than_its_time(standin: StandInAgent, make: Callable[..., ConnectSource]) -> None:
    """For an agent that hangs."""
    spiffe_id = id_of(standin)
    standin.pause()
    began = time.monotonic()
    source = make(spiffe_id, timeout="400ms")
    assert "IdentityError" in error_of(source)
    assert time.monotonic() - began < 3.0
    standin.resume()
    until(lambda: error_of(source), "")


def test_an_index_that_never_blocks_makes_no_busy_loop(standin: StandInAgent, make: Callable[..., ConnectSource]) -> None:
    """0 means nothing: it is asked again once a second."""
    source = make()
    source.load()
    standin.standin.set_index("leaf:orders", 0)
    before = len(standin.standin.requests)
    time.sleep(1.5)
    assert len(standin.standin.requests) - before < 8
    standin.standin.renew("orders")
    until(lambda: source.load().serial == standin.standin.leafs["orders"]["SerialNumber"])


# ---------------------------------------------------------------- its life


def test_closing_ends_the_thread_and_loading_begins_anew(standin: StandInAgent, make: Callable[..., ConnectSource]) -> None:
    """Its connections too; and many times."""
    source = make()
    for _ in range(3):
        source.load()
        assert "meshlib-consul" in names()
        source.close()
        assert "meshlib-consul" not in names()
    assert source.load().spiffe_id == id_of(standin)


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_forked_child_hears_for_itself(standin: StandInAgent, make: Callable[..., ConnectSource]) -> None:
    """The identity of the parent meanwhile, and then what comes; the parent's own queries go on."""
    source = make()
    first = source.load()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            source.after_fork()
            is_kept = source.load().serial == first.serial
            os.write(write, b"x")
            end = time.monotonic() + PATIENCE
            while source.load().serial == first.serial and time.monotonic() < end:
                time.sleep(0.02)
            status = 0 if is_kept and source.load().serial != first.serial else 2
        finally:
            os._exit(status)
    try:
        assert os.read(read, 1) == b"x"
        time.sleep(0.3)
        standin.standin.renew("orders")
        until(lambda: source.load().serial != first.serial)
        end = time.monotonic() + PATIENCE
        ended, status = 0, 0
        while not ended and time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
        assert (ended, os.waitstatus_to_exitcode(status)) == (child, 0)
    finally:
        os.close(read)
        os.close(write)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize(
    "settings",
    [{"url": "http://consul.example:8500"}, {"url": "http://10.0.0.1"}, {"unknown": 1}, {"service": ""}, {"token": "hunter2"}],
)
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    """A plain connection over a network too: the key would go over it."""
    with pytest.raises(ConfigError) as caught:
        open_source(settings, spiffe_id="spiffe://x.consul/ns/default/dc/dc1/svc/orders", trust_domain="x.consul")
    assert "hunter2" not in str(caught.value)
