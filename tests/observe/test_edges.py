"""Is it told, once and at once, when an edge ceases to be private, a stranger calls, or a certificate nears its end?"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib._native import core
from meshlib.observe.edges import (
    CERTIFICATE,
    LEARNING,
    MTLS_LOST,
    NEW_PEER,
    RECENT,
    Alert,
    Alerts,
    Watch,
    duration,
)
from meshlib.secure.alarms import Alarm
from meshlib.secure.bundle import Bundle
from meshlib.secure.ca import CertificateAuthority
from tests.support import identities, mesh_of, server_plan, server_rule

WEB = "spiffe://shop.internal/ns/default/sa/web"
JOBS = "spiffe://shop.internal/ns/default/sa/jobs"
STRANGER = "spiffe://shop.internal/ns/default/sa/stranger"
ANYONE = [{"kind": "any"}]


class World:
    """A service `orders` with the real gate, the configuration of three services, and a clock."""

    def __init__(self, mode: str = "permissive", *, identity: Any = None) -> None:
        self.gate = core.Gate()
        self.calls: dict[str, int] = {}
        self.engine = SimpleNamespace(calls=lambda name: self.calls.get(name, 0))
        self.identity = identity
        self.trust = SimpleNamespace(federation=None, keys=None)
        self.lost: dict[str, str] = {}
        self.directory = SimpleNamespace(faults=lambda now: self.lost)
        self.now, self.wall = 1000.0, 1_778_000_000.0
        self.mode(mode)
        self.watch = Watch(self, wall=lambda: self.wall)
        self.told: list[Alert] = []
        self.watch.alerts.add(self.told.append)

    def mode(self, mode: str, private: tuple[str, ...] = ("web", "jobs")) -> None:
        """Another configuration."""
        names = ("orders", "web", "jobs")
        services = {
            name: SimpleNamespace(identity=f"spiffe://shop.internal/ns/default/sa/{name}", discover=object()) for name in names
        }
        own = SimpleNamespace(mode=mode)
        self.config = SimpleNamespace(
            name="shop", service="orders", own=own, services=services, is_private=lambda name: name in private
        )
        self.gate.publish(server_plan(server_rule("all", callers=ANYONE), mode=mode), 0.0)

    def call(self, peer: str = "", source: str = "10.0.0.1", *, is_tls: bool | None = None) -> int:
        entry = self.gate.begin(
            "GET", b"/", [(b"host", b"orders")], peer, bool(peer) if is_tls is None else is_tls, 0.0, None, 0.0, source
        )
        if not entry.status:
            entry.finish(200, 0.0)
        return int(entry.status)

    def look(self, seconds: float = 1.0) -> list[Alert]:
        """Let time pass, look, and give what is new."""
        self.now += seconds
        self.wall += seconds
        before = len(self.told)
        self.watch.look(self.now)
        return self.told[before:]

    def kinds(self, seconds: float = 1.0) -> list[str]:
        return [alert.kind for alert in self.look(seconds)]

    def rows(self) -> dict[str, tuple[str, int, int]]:
        """Of each caller: state, requests, refused."""
        return {row["caller"]: (row["state"], row["requests"], row["refused"]) for row in self.watch.status(self.now)["in"]}


# ---------------------------------------------------------------- an edge loses mTLS


def test_a_plain_call_at_a_port_that_had_only_mtls_is_an_alert(caplog: pytest.LogCaptureFixture) -> None:
    """By the next look: in the log, to callbacks, in the counters; it names the caller's address and what to do."""
    world = World()
    world.call(WEB)
    assert world.look() == []
    world.call(source="10.0.0.7")
    with caplog.at_level(logging.WARNING, "meshlib.observe"):
        (alert,) = world.look()
    assert (alert.kind, alert.edge, alert.at) == (MTLS_LOST, "10.0.0.7 → orders", world.wall)
    assert "10.0.0.7" in alert.text and "secure.mode" in alert.text
    assert [record.levelname for record in caplog.records] == ["WARNING"] and alert.text in caplog.text
    assert world.watch.alerts.counts == {MTLS_LOST: 1, NEW_PEER: 0, CERTIFICATE: 0}
    assert list(world.watch.alerts.recent) == [alert]


def test_it_is_told_once_until_it_was_well_again() -> None:
    """A caller that goes on in plain is one alert; one that comes back to it after a while is another."""
    world = World()
    world.call(WEB)
    world.look()
    kinds = []
    for _ in range(5):
        world.call(source="10.0.0.7")
        kinds += world.kinds()
    assert kinds == [MTLS_LOST]
    for _ in range(3):
        world.call(WEB)
        assert world.kinds(RECENT) == []
    world.call(source="10.0.0.7")
    assert world.kinds() == [MTLS_LOST]


def test_a_port_that_always_had_plain_callers_loses_nothing() -> None:
    """On the way from plain to mTLS there is no alarm for each who hasn't moved yet."""
    world = World()
    for source in ("10.0.0.7", "10.0.0.8"):
        world.call(source=source)
        assert world.kinds() == []
    world.call(WEB)
    world.call(source="10.0.0.9")
    assert world.kinds() == []


def test_who_came_with_a_certificate_and_comes_in_plain_is_told_by_name() -> None:
    """Even at a port that others use in plain; the edge is the one that was private."""
    world = World()
    world.call(source="10.0.0.9")
    world.watch.proved("10.0.0.7", WEB)
    world.call(WEB, "10.0.0.7")
    assert world.kinds() == []
    world.call(source="10.0.0.9")
    assert world.kinds() == []
    world.call(source="10.0.0.7")
    (alert,) = world.look()
    assert (alert.kind, alert.edge) == (MTLS_LOST, "web → orders")
    assert WEB in alert.text and "10.0.0.7" in alert.text
    world.call(source="10.0.0.7")
    assert world.kinds() == []


def test_where_mtls_is_enforced_a_plain_call_loses_nothing() -> None:
    """It gets no further, and is listed as refused."""
    world = World("enforce")
    world.call(WEB)
    world.look()
    assert world.call(source="10.0.0.7") == 401
    assert world.kinds() == []
    assert world.rows() == {"web": ("mtls", 1, 0), "10.0.0.7": ("plain", 1, 1)}


def test_a_change_of_mode_counts_only_what_comes_after_it() -> None:
    """What was served in plain before stays so."""
    world = World()
    world.call(source="10.0.0.7")
    world.look()
    world.mode("enforce")
    world.call(source="10.0.0.7")
    world.look()
    assert world.rows() == {"10.0.0.7": ("plain", 2, 1)}


def test_our_own_calls_that_become_plain_are_an_alert_with_the_first_of_them() -> None:
    """A change of mesh.yaml alone loses nothing: only a call does."""
    world = World()
    world.calls["web"] = 7
    world.look()
    world.mode("permissive", private=("jobs",))
    assert world.kinds() == []
    world.calls["web"] = 8
    (alert,) = world.look()
    assert (alert.kind, alert.edge) == (MTLS_LOST, "orders → web")
    world.calls["web"] = 9
    assert world.kinds() == []


# ---------------------------------------------------------------- peers


def test_a_peer_that_was_never_seen_is_an_alert_once() -> None:
    """After the process has learnt who calls it; the services of the configuration are known from the start."""
    world = World()
    world.call(STRANGER)
    assert world.kinds() == []
    world.look(LEARNING)
    world.call(JOBS)
    world.call(STRANGER)
    assert world.kinds() == []
    other = STRANGER + "-2"
    world.call(other)
    (alert,) = world.look()
    assert (alert.kind, alert.edge) == (NEW_PEER, f"{other} → orders")
    world.call(other)
    assert world.kinds() == []


def test_a_peer_that_is_refused_has_appeared_as_well() -> None:
    """In mode enforce, where no rule lets it in."""
    world = World("enforce")
    world.gate.publish(server_plan(server_rule("web", callers=[{"kind": "exact", "value": WEB}])), 0.0)
    world.look()
    world.look(LEARNING)
    assert world.call(STRANGER) == 403
    assert world.kinds() == [NEW_PEER]
    assert world.rows() == {STRANGER: ("mtls", 1, 1)}


def test_a_service_of_a_new_configuration_is_known() -> None:
    """Whoever adds a service to mesh.yaml means it."""
    world = World()
    world.look()
    world.look(LEARNING)
    world.config = SimpleNamespace(
        **{**vars(world.config), "services": {**world.config.services, "new": SimpleNamespace(identity=STRANGER, discover=None)}}
    )
    world.call(STRANGER)
    assert world.kinds() == []
    assert set(world.rows()) == {"new"}


# ---------------------------------------------------------------- our certificate


class Store:
    """An identity store, as far as it is looked at."""

    alarms: tuple[Alarm, ...] = ()

    def __init__(self, begin: float, end: float) -> None:
        self.current: Any = SimpleNamespace(
            serial="a1", spiffe_id="spiffe://shop.internal/ns/default/sa/orders", not_before=begin, not_after=end
        )
        self.current.spent = lambda now: (now - begin) / (end - begin)


def test_a_certificate_past_three_quarters_of_its_life_is_an_alert_once() -> None:
    """And again for another one; 75 % itself is not past it."""
    world = World()
    world.identity = Store(world.wall, world.wall + 1000)
    assert world.kinds(750) == []
    (alert,) = world.look()
    assert (alert.kind, alert.edge) == (CERTIFICATE, "orders")
    assert "a1" in alert.text and "ends in 4 min" in alert.text
    assert world.kinds() == []
    certificate = world.watch.status(world.now)["certificate"]
    assert (certificate["serial"], certificate["spent"], certificate["is_overdue"]) == ("a1", 0.752, True)
    world.identity = Store(world.wall, world.wall + 1000)
    world.identity.current.serial = "b2"
    assert world.kinds() == []
    assert world.kinds(800) == [CERTIFICATE]


def test_without_a_certificate_there_is_none_to_tell_of() -> None:
    """Mode observe, or none yet."""
    world = World("observe", identity=SimpleNamespace(current=None, alarms=()))
    assert world.kinds() == []
    assert world.watch.status(world.now)["certificate"] is None


def test_the_end_of_a_certificate_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the identity store, which those without a watch have, too; the alert goes to callbacks, the counter and the status."""
    identities(tmp_path, "me")
    with mesh_of(tmp_path, {}, mode="permissive") as mesh, caplog.at_level(logging.WARNING, "meshlib"):
        store = mesh.identity
        assert store is not None and store.current is not None
        spent = store.current.not_before + 0.8 * (store.current.not_after - store.current.not_before)
        told: list[Alert] = []
        watch = Watch(mesh, wall=lambda: spent)
        watch.alerts.add(told.append)
        store._wall_clock = lambda: spent
        for _ in range(3):
            store.refresh(0.0)
            watch.look(0.0)
        assert [record.name for record in caplog.records if "nothing" in record.getMessage()] == ["meshlib.secure"]
        assert ([alert.kind for alert in told], watch.alerts.counts[CERTIFICATE]) == ([CERTIFICATE], 1)
        assert [alarm["kind"] for alarm in watch.status(0.0)["alarms"]] == ["life"]
        assert 'meshlib_secure_identity_alarms{kind="life"} 1' in mesh.metrics()


# ---------------------------------------------------------------- by what others are believed


def keys(**changes: Any) -> Any:
    """A key store with one provider."""
    row = {
        "provider": "people",
        "source": "url",
        "keys": 2,
        "age": 30.0,
        "failures": 1,
        "error": "",
        "fetches": 4,
        "stale": 3600.0,
    }
    return SimpleNamespace(stats=lambda: [row | changes])


@pytest.mark.parametrize(
    ("changes", "state", "age", "fault"),
    [
        ({}, "good", 30.0, ""),
        ({"error": "no route", "age": 2700.0}, "good", 2700.0, ""),
        ({"error": "", "age": 2701.0}, "good", 2701.0, ""),
        ({"error": "no route", "age": 2701.0}, "stale", 2701.0, "nothing has confirmed them for 45 min: no route"),
        ({"source": "file", "error": "gone", "age": 3.0}, "good", 3.0, ""),
        ({"source": "file", "error": "gone", "age": 3.5}, "stale", 3.5, "nothing has confirmed them for 4 s: gone"),
        ({"keys": 0, "age": -1.0}, "missing", None, "its tokens are refused: there are none yet"),
        ({"keys": 0, "age": -1.0, "error": "no route"}, "missing", None, "its tokens are refused: no route"),
        ({"keys": 0, "age": 5.0}, "missing", 5.0, "its tokens are refused: its set has no keys"),
        ({"source": "inline", "age": 90_000.0}, "good", None, ""),
    ],
)
def test_keys_are_good_missing_or_stale(changes: Any, state: str, age: float | None, fault: str) -> None:
    """Stale by faults that last, not by one; those of the configuration never."""
    world = World()
    world.trust.keys = keys(**changes)
    (row,) = world.watch.status(world.now)["keys"]
    assert (row["state"], row["age"], row["fault"]) == (state, age, fault)


def test_bundles_are_good_missing_or_stale() -> None:
    """By what the federation says of them; one without any key is as good as none."""
    found = {
        "fine.example": Bundle(x509=(b"root",)),
        "tokens.example": Bundle(x509=(), jwt=b'{"keys":[{"kid":"one"}]}'),
        "old.example": Bundle(x509=(b"root",)),
        "gone.example": Bundle(x509=()),
        "none.example": None,
    }
    rows = [{"trust_domain": name, "source": "url", "roots": 0, "age": 9.0, "failures": 0} for name in found]
    faults = {"old.example": "it is 900 s old: no route", "none.example": "there is none yet"}
    world = World()
    world.trust.federation = SimpleNamespace(stats=lambda: rows, faults=lambda: faults, bundle_of=found.get)
    told = world.watch.status(world.now)["bundles"]
    assert {row["trust_domain"]: (row["state"], row["age"], row["fault"][:20]) for row in told} == {
        "fine.example": ("good", 9.0, ""),
        "tokens.example": ("good", 9.0, ""),
        "old.example": ("stale", 9.0, "it is 900 s old: no "),
        "gone.example": ("missing", 9.0, "it has withdrawn all"),
        "none.example": ("missing", None, "there is none yet"),
    }


def test_a_whole_mesh_tells_by_what_it_believes_others(tmp_path: Path) -> None:
    """A partner's bundle that is there, one that isn't, and a provider whose file isn't: in the status and in the metrics."""
    (tmp_path / "partner.pem").write_bytes(CertificateAuthority.create(None, "partner.example").bundle)
    federation = {name: {"file": str(tmp_path / f"{name.split('.')[0]}.pem")} for name in ("partner.example", "late.example")}
    people = {"issuer": "https://id.example/", "audiences": ["me"], "jwks": {"file": str(tmp_path / "keys.json")}}
    secure = {"mode": "observe", "federation": federation, "jwt": {"people": people}}
    with mesh_of(tmp_path, {"me": {"secure": {"jwt": {"providers": ["people"]}}}}, secure=secure) as mesh:
        status = json.loads(json.dumps(mesh.watch.status(0.0)))
        text = mesh.metrics()
    assert [(row["trust_domain"], row["state"], row["roots"]) for row in status["bundles"]] == [
        ("late.example", "missing", 0),
        ("partner.example", "good", 1),
    ]
    assert "late.pem" in status["bundles"][0]["fault"]
    ((provider, state, fault),) = [(row["provider"], row["state"], row["fault"]) for row in status["keys"]]
    assert (provider, state, "keys.json" in fault) == ("people", "missing", True)
    assert status["alarms"] == []
    assert 'meshlib_secure_token_keys{provider="people"} 0' in text
    assert 'meshlib_secure_token_keys_failures_total{provider="people"} 1' in text
    assert 'meshlib_secure_bundle_failures_total{trust_domain="late.example"} 1' in text
    assert 'meshlib_secure_bundle_age_seconds{trust_domain="partner.example"} ' in text


def test_what_isnt_well_is_told_without_secrets_and_in_one_line() -> None:
    """Faults quote what others answered."""
    world = World()
    world.identity = Store(world.wall, world.wall + 1000)
    evil = "x\nhttps://a/?access_token=hunter2"
    world.identity.alarms = (Alarm("note", evil, evil),)
    world.trust.keys = keys(keys=0, error=evil)
    status = world.watch.status(world.now)
    clean = "x\\x0ahttps://a/?access_token=(redacted)"
    assert status["alarms"] == [{"kind": "note", "about": clean, "message": clean}]
    assert status["keys"][0]["fault"] == f"its tokens are refused: {clean}"


# ---------------------------------------------------------------- what is seen


def test_last_seen_is_when_calls_came() -> None:
    """Not when we looked."""
    world = World()
    world.call(WEB)
    world.look()
    seen = world.wall
    world.look(100)
    rows = {row["caller"]: row for row in world.watch.status(world.now)["in"]}
    assert rows["web"]["last_seen"] == seen


def test_a_status_has_both_directions_and_is_plain_data() -> None:
    """JSON, with what is unused, refused or would be denied."""
    world = World()
    world.gate.publish(server_plan(server_rule("web", callers=[{"kind": "exact", "value": WEB}]), mode="permissive"), 0.0)
    world.calls["web"] = 3
    world.call(STRANGER)
    world.call(source="")
    world.look()
    status = json.loads(json.dumps(world.watch.status(world.now)))
    assert {key: status[key] for key in ("mesh", "service", "mode", "version", "port")} == {
        "mesh": "shop",
        "service": "orders",
        "mode": "permissive",
        "version": 1,
        "port": "mixed",
    }
    assert [(row["caller"], row["state"], row["would_deny"]) for row in status["in"]] == [
        (STRANGER, "mtls", 1),
        ("(unknown address)", "plain", 0),
    ]
    assert [(row["callee"], row["state"], row["requests"]) for row in status["out"]] == [
        ("jobs", "unused", 0),
        ("web", "mtls", 3),
    ]


def test_services_that_are_found_badly_are_alarms() -> None:
    """Who calls them is told so beside what is wrong with his identity."""
    world = World()
    assert world.watch.status(world.now)["alarms"] == []
    world.lost = {"stock": "etcd has lost \x1b[2J 4 of 5"}
    (alarm,) = world.watch.status(world.now)["alarms"]
    assert (alarm["kind"], alarm["about"]) == ("discovery", "stock")
    assert "4 of 5" in alarm["message"] and "\x1b" not in alarm["message"]


def test_a_forked_child_counts_anew_and_alarms_of_nothing_old() -> None:
    """Its gate begins at zero, while the watch remembers the parent's numbers."""
    world = World()
    for _ in range(3):
        world.call(WEB)
    world.look()
    world.gate.reset()
    assert world.kinds() == []
    world.call(WEB)
    assert world.kinds() == []
    assert world.rows() == {"web": ("mtls", 1, 0)}


def test_a_callback_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The others are called, and the log says so."""
    alerts, told = Alerts(), []

    def fail(alert: Alert) -> None:
        raise RuntimeError("no")

    alerts.add(fail)
    alerts.add(told.append)
    alert = Alert(NEW_PEER, "a → b", "text\nof a stranger", 1.0)
    alerts.tell(alert)
    assert told == [alert]
    assert "callback" in caplog.text and "text\\x0aof" in caplog.text


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of addresses, peers and alerts."""
    monkeypatch.setattr("meshlib.observe.edges.MOST_PROVED", 3)
    monkeypatch.setattr("meshlib.observe.edges.MOST_PEERS", 5)
    world = World()
    for number in range(10):
        world.watch.proved(f"10.0.0.{number}", WEB)
    assert list(world.watch._proved) == ["10.0.0.7", "10.0.0.8", "10.0.0.9"]
    world.look()
    world.look(LEARNING)
    for number in range(10):
        world.call(f"{STRANGER}-{number}")
    assert world.kinds() == [NEW_PEER, NEW_PEER]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (172_800, "2 d"),
        (7_776_000, "90 d"),
        (-5, "0 s"),
    ],
)
def test_times_for_people(seconds: float, text: str) -> None:
    """In the largest unit that says enough."""
    assert duration(seconds) == text


def test_a_whole_mesh_can_be_watched(tmp_path: Path) -> None:
    """The parts that are looked at are those of a Mesh, and its metrics tell of alerts and plain callers."""
    identities(tmp_path, "me")
    with mesh_of(tmp_path, {"orders": {"discover": {"static": ["127.0.0.1:1"]}}}, mode="permissive") as mesh:
        watch = Watch(mesh, learning=0.0)
        mesh.watch = watch  # type: ignore[attr-defined]
        watch.look(0.0)
        for peer, source in ((STRANGER, ""), ("", "10.0.0.7")):
            mesh.gate.begin("GET", b"/", [(b"host", b"me")], peer, bool(peer), 0.0, None, 0.0, source).finish(200, 0.0)
        watch.look(1.0)
        status = watch.status(1.0)
        text = mesh.metrics()
    assert [row["state"] for row in status["in"]] == ["mtls", "plain"]
    assert status["out"] == [{"caller": "me", "callee": "orders", "state": "unused", "requests": 0, "last_seen": 0.0}]
    assert status["certificate"]["spent"] < 0.01
    assert 'meshlib_observe_alerts_total{kind="new_peer"} 1' in text
    assert 'meshlib_secure_plain_total{client="10.0.0.7"} 1' in text
