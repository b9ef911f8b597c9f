"""What does the agent tell of itself?

The answers of the admin socket, from what its parts know: names, addresses, times and counts. Whoever adds to it keeps keys, secrets,
selectors and what is known of callers out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..observe.names import Metric
from .admin import Samples, View

if TYPE_CHECKING:
    from .acceptor import Acceptor
    from .run import Agent

VERSION: Final = 1

_IDENTITY: Final = ("service", "spiffe_id")
LEFT: Final = Metric(
    "meshlib_agent_identity_left_seconds", "gauge", "Until the certificate ends; 0 without one.", _IDENTITY, "seconds"
)
ROTATIONS: Final = Metric("meshlib_agent_rotations_total", "counter", "Certificates, roots or revocations renewed.", _IDENTITY)
FAILURES: Final = Metric("meshlib_agent_identity_failures_total", "counter", "Looks at an identity that failed.", _IDENTITY)
ALARMS: Final = Metric("meshlib_agent_alarms", "gauge", "What isn't well now.")
RELOADS: Final = Metric("meshlib_agent_reloads_total", "counter", "Configurations that were taken over or refused.", ("result",))
UPTIME: Final = Metric("meshlib_agent_uptime_seconds", "gauge", "Since the agent began to serve.", (), "seconds")
CALLERS: Final = Metric(
    "meshlib_agent_callers_total",
    "counter",
    "Connections to the agent's sockets: accepted, of these from who fits no entry, or refused by a rule.",
    ("socket", "result"),
)
ADOPTED: Final = Metric(
    "meshlib_agent_data_callers_total", "counter", "Attested callers of the data path, taken or without an identity.", ("result",)
)

# Of the data path: `door` is `data` for delegated calls, else the service at whose address they come in.
_DOOR: Final = ("door",)
_DOORS: Final = {
    "connections_opened": Metric("meshlib_agent_connections_total", "counter", "Connections that were opened to it.", _DOOR),
    "connections_open": Metric("meshlib_agent_connections", "gauge", "Connections to it that are open.", _DOOR),
    "connections_refused": Metric("meshlib_agent_connections_refused_total", "counter", "Connections beyond a bound.", _DOOR),
    "requests": Metric("meshlib_agent_requests_total", "counter", "Requests that came in.", _DOOR),
    "malformed": Metric("meshlib_agent_malformed_total", "counter", "Requests and connections that were turned away.", _DOOR),
    "late": Metric("meshlib_agent_late_total", "counter", "Requests and connections that were too slow.", _DOOR),
    "bytes_received": Metric("meshlib_agent_received_bytes_total", "counter", "Bytes that came in.", _DOOR, "bytes"),
    "bytes_written": Metric("meshlib_agent_written_bytes_total", "counter", "Bytes that went back.", _DOOR, "bytes"),
}
FAILED: Final = Metric("meshlib_agent_failed_total", "counter", "Attempts that failed before a head came.", ("door", "reason"))
UPSTREAM: Final = Metric("meshlib_agent_upstream_total", "counter", "Connections to endpoints: opened, or used again.", ("how",))
UPSTREAM_OPEN: Final = Metric("meshlib_agent_upstream_connections", "gauge", "Connections that the agent has open.", ("to",))
TLS: Final = Metric("meshlib_agent_tls_total", "counter", "What TLS has counted for an identity.", ("spiffe_id", "side", "what"))


def view_of(agent: Agent) -> View:
    return View(
        health=lambda: health(agent),
        certificates=agent.issuer.rows,
        connections=lambda: connections(agent),
        entries=lambda: entries(agent),
        metrics=lambda: metrics(agent),
    )


def alarms_of(agent: Agent) -> list[tuple[str, str]]:
    """What isn't well: whom it is about ("" for the agent), and what it is."""
    own = [("", f"the configuration can't be used, the last good one stays: {agent.fault}")] if agent.fault else []
    own += [("", agent.late)] if agent.late else []
    if agent.config.url and not agent.config.fresh:
        own.append(
            ("", f"{agent.source} can't be read: the configuration is the last one that was in force here, and may be old")
        )
    return [*own, *agent.issuer.alarms, *agent.data.alarms]


def health(agent: Agent) -> dict[str, Any]:
    alarms = alarms_of(agent)
    config = agent.config
    return {
        "version": VERSION,
        "status": "draining" if agent.is_draining else "degraded" if alarms else "ok",
        "pid": os.getpid(),
        "trust_domain": config.trust_domain,
        "config": agent.source,
        "uptime": time.monotonic() - agent.began,
        "reloads": agent.reloads,
        "reload_failures": agent.reload_failures,
        "identities": {"in_force": len(agent.issuer.identities), "wanted": len(agent.issuer.rows())},
        # Who they are stands in the log.
        "strangers": {"count": agent.strangers.counts.total(), "since": agent.strangers.since},
        "alarms": [{"about": about, "message": message} for about, message in alarms],
    }


def connections(agent: Agent) -> dict[str, Any]:
    return {"listeners": agent.data.rows(), "connections": agent.data.proxy.connections()}


def entries(agent: Agent) -> list[dict[str, Any]]:
    """By their numbers in the configuration."""
    assert agent.config.agent is not None
    return [
        {
            "entry": number,
            "service": entry.service,
            "spiffe_id": agent.issuer.id_of(entry),
            "has_identity": agent.issuer.identity_of(entry) is not None,
        }
        for number, entry in enumerate(agent.config.agent.entries)
    ]


def metrics(agent: Agent) -> Iterator[tuple[Metric, Samples]]:
    rows = agent.issuer.rows()
    keys = [(row["service"], row["spiffe_id"]) for row in rows]
    yield LEFT, zip(keys, (max(0.0, row["left"] or 0.0) for row in rows), strict=True)
    yield ROTATIONS, zip(keys, (row["rotations"] for row in rows), strict=True)
    yield FAILURES, zip(keys, (row["failures"] for row in rows), strict=True)
    yield ALARMS, [((), len(alarms_of(agent)))]
    yield RELOADS, [(("taken",), agent.reloads), (("refused",), agent.reload_failures)]
    yield UPTIME, [((), time.monotonic() - agent.began)]
    yield ADOPTED, [(("taken",), agent.data.adopted), (("refused",), agent.data.turned_away)]
    yield CALLERS, [sample for name, acceptor in agent.acceptors.items() for sample in _callers(agent, name, acceptor)]
    yield from _of_proxy(agent.data.proxy.stats())


def _callers(agent: Agent, name: str, acceptor: Acceptor) -> Iterator[tuple[tuple[str, str], float]]:
    yield (name, "accepted"), acceptor.accepted
    yield (name, "no_entry"), agent.strangers.counts[name]
    for rule, count in acceptor.refused.items():
        yield (name, rule), count


def _of_proxy(stats: Mapping[str, Any]) -> Iterator[tuple[Metric, Samples]]:
    doors: dict[str, Mapping[str, Any]] = {"data": stats.get("outbound", {}), **stats.get("inbound", {})}
    for key, metric in _DOORS.items():
        yield metric, [((name,), row[key]) for name, row in doors.items() if key in row]
    yield FAILED, [((name, why), count) for name, row in doors.items() for why, count in row.get("failed", {}).items()]
    upstream = stats.get("upstream", {})
    yield UPSTREAM, [((how,), upstream[how]) for how in ("opened", "reused") if how in upstream]
    places = (("endpoints", "open"), ("applications", "application_open"))
    yield UPSTREAM_OPEN, [((to,), upstream[key]) for to, key in places if key in upstream]
    yield (
        TLS,
        [
            ((spiffe_id, side, what), count)
            for spiffe_id, row in stats.get("identities", {}).items()
            for side, counts in row.items()
            if isinstance(counts, Mapping)
            for what, count in counts.items()
        ],
    )


def lines_of(agent: Agent) -> Iterable[str]:
    """What is said when it begins to serve."""
    policy = agent.config.agent
    assert policy is not None
    by = f"the CA in {policy.ca}" if policy.ca is not None else f"the CA at {policy.enrol}"
    in_force, wanted = len(agent.issuer.identities), len(agent.issuer.rows())
    yield f"The agent of {agent.config.trust_domain} serves {in_force} of {wanted} identities, issued by {by}."
    yield f"  identities   unix://{policy.socket}"
    yield f"  data path    unix://{policy.data}"
    for row in agent.data.rows():
        how = row["mode"] if row["is_open"] else row["error"] or "waits for its identity"
        yield f"  {row['service']:<12} {row['address']} ({how})"
    yield f"  how it is    meshlib agent status   (unix://{policy.admin})"
