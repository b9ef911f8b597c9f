"""Which edges of this process are private, who is at their other ends, and what has just got worse?

An edge is a caller and a service. Those that end here come from the gate's counters, by who was proved to call; those that begin here
from the configuration and the engine's. Their state is `mtls`, `tls` (encrypted, and nobody proved who they are), `plain` or `mixed`.
Who comes in plain has no name, so it is told by address: a team that moves from permissive to enforce works through that list.

`Watch.look` is called each second and compares with what it saw before. Three things are alerts (`Alert.kind`):

    mtls_lost     plain calls come from where calls came with a certificate, or at a port that had only such; or this process now
                  calls in plain what it called over mTLS
    new_peer      a caller appears that is no service of the configuration and was not seen while the process was young
    certificate   three quarters of our certificate's life are gone, so that nothing renews it

Each is told once for each edge, and again after it was well for `RECENT` seconds: as a WARNING in the log (of the certificate, the
identity store logs it), in a counter, and to callbacks. What was seen is kept in memory only: after a restart everything is learnt
again, from the configuration first. `status` has beside it by what the process believes others: bundles, and keys for tokens, each
`good`, `missing` or `stale`.
It refuses nothing and closes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

from .redact import one_line, shown

logger = logging.getLogger("meshlib.observe")

MTLS_LOST: Final = "mtls_lost"
NEW_PEER: Final = "new_peer"
CERTIFICATE: Final = "certificate"
KINDS: Final = (MTLS_LOST, NEW_PEER, CERTIFICATE)

MTLS: Final = "mtls"
TLS: Final = "tls"
PLAIN: Final = "plain"
MIXED: Final = "mixed"
UNUSED: Final = "unused"

GOOD: Final = "good"
MISSING: Final = "missing"
STALE: Final = "stale"

# Seconds after which an edge is judged by what came since, and an alert may be told again.
RECENT: Final = 300.0
# Seconds of a process's life in which callers become known without a word.
LEARNING: Final = 60.0
# Share of the certificate's life after which somebody should look why nothing renews it.
ALARM: Final = 0.75
# Seconds for which keys that are looked at each second may be out of reach: a mount that swaps is no fault.
SWAP: Final = 3.0
MOST_ALERTS: Final = 50
MOST_PEERS: Final = 10_000
MOST_PROVED: Final = 10_000
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that somebody should look at. `edge` is "caller → service", or the service alone; `at` is Unix time."""

    kind: str
    edge: str
    text: str
    at: float = 0.0


class Alerts:
    """Where alerts go: the log, the counters, and whoever asked to be called. State of the process."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Alert], object]] = []
        self._counts = dict.fromkeys(KINDS, 0)
        self._recent: deque[Alert] = deque(maxlen=MOST_ALERTS)

    def add(self, callback: Callable[[Alert], object]) -> None:
        """Call back with every alert, in the keeper's thread: be quick, and hand on what takes time."""
        self._callbacks.append(callback)

    def tell(self, alert: Alert) -> None:
        self._counts[alert.kind] = self._counts.get(alert.kind, 0) + 1
        self._recent.append(alert)
        if alert.kind != CERTIFICATE:
            # The identity store says it to those who have no watch, too.
            logger.warning("%s: %s", alert.kind, one_line(alert.text))
        for callback in tuple(self._callbacks):
            try:
                callback(alert)
            except Exception:
                logger.exception("a callback for alerts failed")

    @property
    def counts(self) -> Mapping[str, int]:
        """How many alerts there were, by kind; 0 for kinds that there were none of."""
        return dict(self._counts)

    @property
    def recent(self) -> Sequence[Alert]:
        """The last of them, the newest last."""
        return tuple(self._recent)


class Watched(Protocol):
    """What is watched: a `Mesh`, as far as it is looked at."""

    @property
    def config(self) -> Any: ...
    @property
    def gate(self) -> Any: ...
    @property
    def engine(self) -> Any: ...
    @property
    def identity(self) -> Any: ...
    @property
    def trust(self) -> Any: ...
    @property
    def directory(self) -> Any: ...


@dataclass(slots=True)
class _Seen:
    """One caller, by its name or by its address: how often, and when last (wall clock; 0.0 before we began to look)."""

    requests: int = 0
    refused: int = 0
    would_deny: int = 0
    last: float = 0.0
    is_told: bool = False

    def take(self, row: Mapping[str, Any], wall: float, *, are_refused: bool = False) -> bool:
        """Take over newer numbers; True if calls came in since the last look that were not refused.

        `are_refused`: the row can't tell, and all that came since were.
        """
        requests = int(row["requests"])
        if requests < self.requests:
            # A forked child counts anew.
            self.requests = self.refused = 0
        refused = self.refused + requests - self.requests if are_refused else max(int(row["refused"]), self.refused)
        is_news = requests - refused > self.requests - self.refused
        if requests != self.requests:
            self.last = wall
        self.requests, self.refused, self.would_deny = requests, refused, int(row["would_deny"])
        return is_news


@dataclass(slots=True)
class _Outbound:
    """A service that we call: in plain or over mTLS, and how many calls it had when that changed."""

    is_private: bool
    lost_at: int | None = None
    calls: int = 0
    last: float = 0.0


@dataclass(slots=True)
class _Port:
    """When calls of each kind came last, monotonic; None for never."""

    last: dict[str, float] = field(default_factory=dict)


class Watch:
    """Looks at a mesh each second. All methods but `proved` belong to the keeper's thread; `status` may be called from any."""

    def __init__(
        self,
        mesh: Watched,
        alerts: Alerts | None = None,
        *,
        wall: Callable[[], float] = time.time,
        learning: float = LEARNING,
    ) -> None:
        self._mesh = mesh
        self.alerts = alerts or Alerts()
        self._wall = wall
        self._learning = learning
        self._began: float | None = None
        self._started = wall()
        self._config: Any = None
        self._names: dict[str, str] = {}
        self._peers: dict[str, _Seen] = {}
        self._plain: dict[str, _Seen] = {}
        self._anonymous = _Seen()
        self._port = _Port()
        self._known: set[str] = set()
        self._out: dict[str, _Outbound] = {}
        self._alarmed = ""
        # Addresses from which somebody came with a certificate, and who it was; the oldest goes first.
        self._proved: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ what is told to it

    def proved(self, address: str, peer: str) -> None:
        """A connection from this address proved who it is. Told once for each connection, by those who accept them."""
        with self._lock:
            self._proved[address] = peer
            self._proved.move_to_end(address)
            if len(self._proved) > MOST_PROVED:
                self._proved.popitem(last=False)

    def look(self, now: float) -> None:
        """Compare with the last look, and tell what has got worse. `now` is monotonic."""
        if self._began is None:
            self._began = now
        config = self._mesh.config
        if config is not self._config:
            self._follow(config)
        wall = self._wall()
        self._look_in(now, wall)
        self._look_out(wall)
        self._look_at_certificate(wall)

    # ------------------------------------------------------------------ looking

    def _follow(self, config: Any) -> None:
        """Another configuration: its services are known, and some may be called in another way from now on."""
        self._config = config
        self._names = {policy.identity: name for name, policy in config.services.items()}
        self._known.update(self._names)
        calls = self._mesh.engine.calls
        for name, policy in config.services.items():
            if name == config.service or getattr(policy, "discover", None) is None:
                continue
            is_private, old = bool(config.is_private(name)), self._out.get(name)
            if old is None:
                self._out[name] = _Outbound(is_private, None, int(calls(name)))
            elif old.is_private != is_private:
                old.lost_at = int(calls(name)) if old.is_private else None
                old.is_private = is_private
        for name in self._out.keys() - config.services.keys():
            del self._out[name]

    def _look_in(self, now: float, wall: float) -> None:
        rows = self._mesh.gate.edges()
        news: list[str] = []
        for row in rows:
            peer = str(row["peer"])
            if peer:
                seen = self._peers.setdefault(peer, _Seen())
                if seen.take(row, wall):
                    news.append(MTLS)
                self._meet(peer, now, wall)
            elif row["is_tls"] and self._anonymous.take(row, wall):
                news.append(TLS)
        is_enforced = self._mesh.config.own.mode == "enforce"
        newly_plain = [
            (address, seen)
            for address, row in self._plain_rows(rows).items()
            # Where mTLS is enforced, what comes in plain doesn't get in; the gate's rows of addresses don't say so.
            if (seen := self._plain.setdefault(address, _Seen())).take(row, wall, are_refused=is_enforced)
        ]
        # Judged by what was before this look: calls of both kinds within a second are no loss yet, the next plain one is.
        had_only_mtls = self._state(now) == MTLS
        for address, seen in newly_plain:
            self._miss(address, seen, had_only_mtls, wall)
            news.append(PLAIN)
        for kind in news:
            self._port.last[kind] = now
        for seen in self._plain.values():
            if seen.is_told and wall - seen.last > RECENT:
                seen.is_told = False

    @staticmethod
    def _plain_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Calls without TLS by the address that they came from; "" where it isn't known."""
        found: dict[str, Mapping[str, Any]] = {}
        for row in rows:
            if not row["peer"] and not row["is_tls"]:
                found[str(row["address"])] = row
        return found

    def _meet(self, peer: str, now: float, wall: float) -> None:
        if peer in self._known or len(self._known) >= MOST_PEERS:
            return
        self._known.add(peer)
        if now - (self._began or now) < self._learning:
            return
        service = self._mesh.config.service
        text = (
            f"{peer} calls {service}, is no service of mesh.yaml, and was never seen before. If it is meant, name it under "
            "`services` or in a rule's `from`; if not, see who issued its certificate."
        )
        self.alerts.tell(Alert(NEW_PEER, f"{peer} → {service}", text, wall))

    def _miss(self, address: str, seen: _Seen, had_only_mtls: bool, wall: float) -> None:
        with self._lock:
            peer = self._proved.get(address, "")
        if seen.is_told or not (peer or had_only_mtls):
            return
        seen.is_told = True
        service, where = self._mesh.config.service, address or "an unknown address"
        if peer:
            caller, text = self._named(peer), f"{where} came to {service} over mTLS as {peer}, and now comes in plain."
        else:
            caller, text = where, f"a plain call came to {service} from {where}; all calls before it came over mTLS."
        text += " Look at the caller's secure.mode and identity. In mode enforce such calls are refused."
        self.alerts.tell(Alert(MTLS_LOST, f"{caller} → {service}", text, wall))

    def _look_out(self, wall: float) -> None:
        calls, service = self._mesh.engine.calls, self._mesh.config.service
        for name, edge in self._out.items():
            count = int(calls(name))
            if count != edge.calls:
                edge.calls, edge.last = count, wall
            if edge.lost_at is not None and count > edge.lost_at:
                edge.lost_at = None
                text = (
                    f"{service} calls {name} in plain, and called it over mTLS before: one of the two has come to mode observe "
                    "by a change of mesh.yaml."
                )
                self.alerts.tell(Alert(MTLS_LOST, f"{service} → {name}", text, wall))

    def _look_at_certificate(self, wall: float) -> None:
        identity = self._mesh.identity
        current = None if identity is None else identity.current
        if current is None or current.serial == self._alarmed or current.spent(wall) <= ALARM:
            return
        self._alarmed = current.serial
        left = current.not_after - wall
        text = (
            f"{current.spent(wall):.0%} of the life of our certificate are gone and nothing has renewed it: {current.spiffe_id}, "
            f"serial {current.serial}, "
            + (f"ends in {duration(left)}." if left > 0 else f"ended {duration(-left)} ago.")
            + " See the log for why it was not renewed, or issue it again (`meshlib ca issue`)."
        )
        self.alerts.tell(Alert(CERTIFICATE, self._mesh.config.service, text, wall))

    # ------------------------------------------------------------------ what is known

    def _named(self, peer: str) -> str:
        return self._names.get(peer, peer)

    def _state(self, now: float) -> str:
        """What came in during the last minutes; where nothing came, what came last."""
        last = self._port.last
        if not last:
            return UNUSED
        newest = max(last.values())
        kinds = {kind for kind, when in last.items() if when >= min(now - RECENT, newest)}
        if kinds == {MTLS}:
            return MTLS
        if kinds == {TLS}:
            return TLS
        return PLAIN if kinds == {PLAIN} else MIXED

    @property
    def plain(self) -> list[dict[str, Any]]:
        """Who comes in without TLS, in the order in which they first came: client (an address) and requests."""
        return [{"client": address, "requests": seen.requests} for address, seen in self._plain.copy().items()]

    def status(self, now: float) -> dict[str, Any]:
        """All of it as plain data, for `meshlib status`: edges, certificate, bundles, keys, alarms, alerts. There is no secret in it."""
        config, wall = self._mesh.config, self._wall()
        edges_in = [
            _row(self._named(peer), config.service, MTLS, seen, peer=peer) for peer, seen in sorted(self._peers.copy().items())
        ]
        if self._anonymous.requests:
            edges_in.append(_row("(no certificate)", config.service, TLS, self._anonymous))
        edges_in += [
            _row(address or "(unknown address)", config.service, PLAIN, seen)
            for address, seen in sorted(self._plain.copy().items(), key=lambda item: (-item[1].requests, item[0]))
        ]
        edges_out = [
            {
                "caller": config.service,
                "callee": name,
                "state": (MTLS if edge.is_private else PLAIN) if edge.calls else UNUSED,
                "requests": edge.calls,
                "last_seen": edge.last,
            }
            for name, edge in sorted(self._out.copy().items())
        ]
        return {
            "version": VERSION,
            "mesh": config.name,
            "service": config.service,
            "mode": config.own.mode,
            "pid": os.getpid(),
            "started": self._started,
            "now": wall,
            "port": self._state(now),
            "certificate": self._certificate(wall),
            "bundles": self._bundles(),
            "keys": self._keys(),
            "alarms": self._alarms(now),
            "agent": self._agent(),
            "in": edges_in,
            "out": edges_out,
            "alerts": [asdict(alert) for alert in self.alerts.recent],
        }

    def _agent(self) -> dict[str, Any] | None:
        """What goes by the node agent (`out`) and what comes by it (`in`); None where nothing does."""
        outbound, handed = getattr(self._mesh, "outbound", None), getattr(self._mesh, "handed", None)
        delegation = getattr(outbound, "delegation", None)
        if delegation is None and handed is None:
            return None
        return {
            "out": None if delegation is None else delegation.stats(),
            "in": None if handed is None else handed.stats(),
        }

    def _certificate(self, wall: float) -> dict[str, Any] | None:
        identity = self._mesh.identity
        current = None if identity is None else identity.current
        if current is None:
            return None
        spent = current.spent(wall)
        return {
            "spiffe_id": current.spiffe_id,
            "serial": current.serial,
            "not_before": current.not_before,
            "not_after": current.not_after,
            "spent": round(spent, 4),
            "is_overdue": spent > ALARM,
        }

    def _bundles(self) -> list[dict[str, Any]]:
        """Of other trust domains. `age` is None before the first good answer; `fault` says what isn't well."""
        federation = self._mesh.trust.federation
        if federation is None:
            return []
        faults, rows = federation.faults(), []
        for row in federation.stats():
            name, bundle = row["trust_domain"], federation.bundle_of(row["trust_domain"])
            fault = faults.get(name, "")
            state = STALE if fault else GOOD
            if bundle is None:
                state = MISSING
            elif not bundle.x509 and not json.loads(bundle.jwt)["keys"]:
                state, fault = MISSING, fault or "it has withdrawn all its keys, and nobody of it is believed"
            rows.append(
                {
                    "trust_domain": name,
                    "source": row["source"],
                    "roots": row["roots"],
                    "age": None if bundle is None else row["age"],
                    "failures": row["failures"],
                    "state": state,
                    "fault": shown(fault),
                }
            )
        return rows

    def _keys(self) -> list[dict[str, Any]]:
        """For tokens, by provider. `age` is None where none are in force, and where the configuration has them."""
        keys = self._mesh.trust.keys
        return [] if keys is None else [_keys_row(row) for row in keys.stats()]

    def _alarms(self, now: float) -> list[dict[str, str]]:
        """What isn't well and lasts: about the identity, the services that this process calls, and whether others find it."""
        identity = self._mesh.identity
        standing = () if identity is None else identity.alarms
        told = [(alarm.kind, alarm.about, alarm.message) for alarm in standing]
        told += [("discovery", service, fault) for service, fault in self._mesh.directory.faults(now).items()]
        registrar = getattr(self._mesh, "registrar", None)
        if registrar is not None and registrar.fault:
            told.append(("registration", self._mesh.config.service, registrar.fault))
        return [{"kind": kind, "about": shown(about), "message": shown(message)} for kind, about, message in told]


def _keys_row(row: Mapping[str, Any]) -> dict[str, Any]:
    age, error = row["age"], row["error"]
    is_confirmed = age >= 0 and row["source"] != "inline"
    # As with a certificate: somebody should look when three quarters are gone of the time after which they are withdrawn.
    limit = ALARM * row["stale"] if row["source"] == "url" else SWAP
    state, fault = GOOD, ""
    if not row["keys"]:
        state, fault = MISSING, error or ("its set has no keys" if age >= 0 else "there are none yet")
        fault = f"its tokens are refused: {fault}"
    elif error and age > limit:
        state, fault = STALE, f"nothing has confirmed them for {duration(age)}: {error}"
    return {
        "provider": row["provider"],
        "source": row["source"],
        "keys": row["keys"],
        "age": age if is_confirmed else None,
        "failures": row["failures"],
        "state": state,
        "fault": shown(fault),
    }


def _row(caller: str, callee: str, state: str, seen: _Seen, peer: str = "") -> dict[str, Any]:
    return {
        "caller": caller,
        "callee": callee,
        "peer": peer,
        "state": state,
        "requests": seen.requests,
        "refused": seen.refused,
        "would_deny": seen.would_deny,
        "last_seen": seen.last,
    }


def duration(seconds: float) -> str:
    """A time for people, in the largest unit that says enough: 40 s, 12 min, 30 h, 5 d."""
    for least, size, unit in ((2 * 86400, 86400, "d"), (2 * 3600, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"
