"""What does meshlib do when the configuration says nothing, and why?

One table, one row for each default: its key in mesh.yaml, its value, unit and range, the reason, and whose
experience stands behind it. The models take value and range from here (`setting`), so that a default exists once,
and an error message and the JSON Schema can tell the reason too. Rust has no defaults at all: every field of a plan
is written out.

What has no sensible default has no row: the mesh's name, `secure.mode`, the services.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pydantic import Field


@dataclass(frozen=True, slots=True)
class Default:
    """One default. `least` and `most` bound the value, and each item of a list; None where a range makes no sense."""

    name: str
    value: Any
    unit: str
    least: float | None
    most: float | None
    source: str
    reason: str

    @property
    def span(self) -> str:
        """The range in words, "" where there is none."""
        if self.least is None or self.most is None:
            return ""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.least:g} to {self.most:g}{unit}"


# fmt: off
_ROWS: Final = (
    # name, value, unit, least, most, as in, and the reason
    # ------------------------------------------------------------------------------------------------ the system
    Default("egress", "allow", "", None, None, "Istio",
            "calls to hosts that are no service are reported, not broken, until you say so"),
    Default("deadline", 15.0, "s", 0.001, 3600, "Envoy",
            "a call without an end holds its resources for ever; it travels to the next hop"),
    Default("stream_idle", 60.0, "s", 0.05, 86400, "Envoy, which takes 5 min",
            "a stream may last for ever, but not without a sign of life: the deadline ends with its head, this begins"),
    Default("protocol", "http", "", None, None, "",
            "most services speak HTTP/1.1"),
    Default("egress.credentials.header", "authorization", "", None, None, "RFC 9110",
            "where most APIs look for it"),
    # ------------------------------------------------------------------------------------------------ secure
    Default("secure.namespace", "default", "", None, None, "Istio",
            "the path of SPIFFE IDs follows Istio and SPIRE: /ns/<namespace>/sa/<service>"),
    Default("secure.paths", "canonical", "", None, None, "RFC 3986",
            "other spellings of a path are put into one form; `strict` refuses escaped slashes, backslashes and dot segments, "
            "`redirect` sends the caller to the one form"),
    Default("secure.identity.state", "identities", "", None, None, "",
            "beside the file; the private key is made there, and never leaves it"),
    Default("secure.federation.every", 300.0, "s", 10, 86400, "SPIFFE Trust Domain and Bundle 6.1",
            "new keys are published well before they are used; the endpoint's own hint counts if it is shorter"),
    Default("secure.federation.local", False, "", None, None, "Consul CVE-2022-29153",
            "a URL that leads back to this machine reads what only it may read"),
    Default("secure.jwt.algorithms", ("RS256", "ES256"), "", None, None, "RFC 8725",
            "what nearly all issuers sign with; only asymmetric ones, and none that you don't use"),
    Default("secure.jwt.leeway", 30.0, "s", 0, 300, 'RFC 7519, "a few minutes" at most',
            "clocks differ by seconds; more would keep dead tokens alive"),
    Default("secure.jwt.longest", 86400.0, "s", 1, 2_592_000, "meshlib",
            "a token that lives longer than a day was made by mistake, or to be stolen"),
    Default("secure.jwt.from", ("bearer",), "", None, None, "RFC 6750",
            "the header authorization, and nowhere else: cookies are sent unasked, and queries stand in logs"),
    Default("secure.jwt.forward", False, "", None, None, "Istio",
            "who needs no token can't lose it; the application sees the claims"),
    Default("secure.jwt.local", False, "", None, None, "Istio CVE-2026-41413",
            "a URL that leads back to this machine reads what only it may read"),
    Default("secure.proxies.hops", 1, "proxies", 0, 10, "Envoy",
            "one proxy in front; each adds one address to X-Forwarded-For, and only that many are believed"),
    Default("secure.xfcc", "sanitize", "", None, None, "Envoy",
            "who called is what TLS proved; a header that says so was written by anyone"),
    Default("secure.peer_check", "auto", "", None, None, "gRFC A87, which knows it for xDS alone",
            "gRPC compares DNS names: services of our own CA are checked by theirs, all others by their SPIFFE ID, through a relay; "
            "`dns` or `spiffe` makes it one of the two"),
    Default("secure.record", False, "", None, None, "",
            "nothing is kept that nobody asked for"),
    Default("secure.case", "sensitive", "", None, None, "RFC 3986",
            "applications tell /Admin from /admin; those that don't need `insensitive` in the rules that deny"),
    Default("secure.authorizer.timeout", 0.5, "s", 0.001, 60, "Envoy, which takes 200 ms",
            "who can't say within that time whether a call is allowed has not allowed it"),
    Default("secure.dry_run", False, "", None, None, "Envoy",
            "a rule counts; set it to see first whom it would refuse"),
    # ------------------------------------------------------------------------------------------------ observe
    Default("observe.metrics", None, "", None, None, "",
            "no port is opened that nobody asked for"),
    Default("observe.sample", 1.0, "", 0, 1, "OpenTelemetry",
            "all new traces: a caller's own decision (traceparent) wins anyway"),
    # ------------------------------------------------------------------------------------------------ discover
    Default("discover.every", 5.0, "s", 1, 3600, "Envoy",
            "how often DNS is asked; it must not outlive a rollout step"),
    Default("discover.weight", 1.0, "", 0, 1000, "",
            "all endpoints alike; 0 takes no traffic"),
    Default("discover.zone", "", "", None, None, "",
            "not known: such an endpoint is in nobody's zone"),
    # ------------------------------------------------------------------------------------------------ route
    Default("route.weight", 1, "", 0, 1_000_000, "Gateway API",
            "all backends alike; 0 takes no traffic"),
    Default("route.on_disconnect", "calls", "", None, None, "meshlib",
            "whom an answer would not reach any more needs no outgoing calls that may be given up; a payment must not stop half-way"),
    # ------------------------------------------------------------------------------------------------ retry
    Default("retry.attempts", 1, "retries", 0, 5, "Envoy",
            "one retry on another endpoint hides a lost process; more multiply an outage"),
    Default("retry.backoff", (0.025, 0.25), "s", 0.001, 60, "Envoy",
            "full jitter from 25 ms, doubled, at most 250 ms: no herd returns at once"),
    Default("retry.statuses", (502, 503, 504), "", 500, 599, "Envoy",
            "answers of an endpoint that can't serve now; only calls that are safe to repeat"),
    Default("retry.idempotency_key", False, "", None, None, "IETF draft",
            "an Idempotency-Key makes a POST safe only if the service honours it"),
    Default("retry.idempotent", False, "", None, None, "Envoy #2747",
            "only the service's author knows that a route may be called twice"),
    Default("retry.on", ("connect", "refused_stream", "reset", "timeout", "protocol", "identity", "status"), "", None, None,
            "Envoy's retry_on",
            "every failure that may pass on another endpoint; what isn't safe to repeat is not repeated anyway"),
    Default("retry.per_try", 0.0, "s", 0, 3600, "Envoy",
            "off: an attempt may take what the deadline leaves; no other number is right for all services"),
    Default("retry.hedge", False, "", None, None, "gRPC, Envoy",
            "a second attempt beside a slow first one costs load: only you know where that is worth it"),
    Default("retry.hedge_quantile", 0.95, "", 0.5, 0.999, "The Tail at Scale",
            "slower than 19 of 20 of the service's own calls is slow"),
    Default("retry.hedge_share", 0.02, "", 0, 1, "The Tail at Scale",
            "2 % more load take most of the tail away; more would hide an overload and add to it"),
    Default("retry.hedge_least", 0.001, "s", 0, 60, "meshlib",
            "below a millisecond a hedge costs more than it saves"),
    Default("retry.budget.ratio", 0.2, "", 0, 1, "Finagle",
            "retries add at most a fifth to the load, so that they never become the outage"),
    Default("retry.budget.per_second", 10.0, "retries/s", 0, 10_000, "Finagle",
            "a service with few calls may retry too"),
    Default("retry.budget.window", 10.0, "s", 1, 60, "Finagle",
            "what was saved up longer ago says nothing about now"),
    # ------------------------------------------------------------------------------------------------ balance
    Default("balance.policy", "peak_ewma", "", None, None, "Finagle, Linkerd",
            "the faster of two drawn at random: follows latency without herding"),
    Default("balance.decay", 10.0, "s", 0.001, 600, "Linkerd",
            "how long a peak of latency is remembered"),
    Default("balance.start", 0.03, "s", 0.001, 60, "Linkerd",
            "a new endpoint is neither free nor slow"),
    Default("balance.penalty", 5.0, "s", 0, 300, "Linkerd",
            "a failure counts as slow, or fast failures would draw the traffic"),
    Default("balance.panic", 0.5, "", 0, 1, "Envoy",
            "below this share of healthy endpoints all are used: the few left would drown"),
    Default("balance.weights", "discover", "", None, None, "",
            "what discover says; `orca` needs endpoints that report their load"),
    Default("balance.orca.blackout", 10.0, "s", 0, 3600, "gRPC A58",
            "the first reports of an endpoint that warms up say nothing"),
    Default("balance.orca.expiry", 180.0, "s", 1, 86400, "gRPC A58",
            "a report that is older says nothing"),
    Default("balance.orca.error_penalty", 1.0, "", 0, 100, "gRPC A58",
            "an endpoint that fails quickly looks idle: its errors count as load"),
    Default("balance.slow_start", 10.0, "s", 0, 3600, "Envoy",
            "a process that has just started is slow: it gets its share bit by bit; 0 gives it at once"),
    Default("balance.slow_start_least", 0.1, "", 0.001, 1, "Envoy",
            "with a tenth of its share an endpoint warms up, and few calls wait for it"),
    Default("balance.hash_on", (), "", None, None, "",
            "ring_hash and maglev need to be told what decides"),
    Default("balance.hash_bound", 0.0, "", 0, 10, "Consistent hashing with bounded loads; Envoy",
            "off: a key has one home; 1.25 sends it on when its home has a quarter more than the mean in flight"),
    Default("balance.ring_size", 1024, "points", 1, 8_388_608, "Envoy",
            "even shares for some dozens of endpoints; each point takes memory"),
    Default("balance.table_size", 65537, "slots", 2, 5_000_011, "Maglev, Envoy",
            "a prime, a hundred times the number of endpoints or more"),
    Default("balance.locality", "zone_aware", "", None, None, "Envoy",
            "calls stay in their zone as far as its endpoints can carry them; without zones it does nothing"),
    Default("balance.zones", (), "", None, None, "",
            "after the own zone, all others are alike"),
    Default("balance.overprovisioning", 1.4, "", 1, 100, "Envoy",
            "a zone keeps all its calls while 72 % of it are healthy"),
    Default("balance.zone_aware_from", 6, "endpoints", 1, 100_000, "Envoy",
            "with fewer endpoints one zone is easily overrun"),
    # ------------------------------------------------------------------------------------------------ admit
    Default("admit.in_flight", 1024, "calls", 1, 1_000_000, "Envoy",
            "calls at once for each service and process; more is refused, or waits if `pending` says so"),
    Default("admit.pending", 0, "calls", 0, 1_000_000, "meshlib",
            "a queue turns an overload into latency: who can't be served is told at once"),
    Default("admit.connect", 1.0, "s", 0.01, 60, "Linkerd",
            "inside a data centre a connect takes a millisecond, or fails"),
    Default("admit.breaker.failures", 5, "failures", 1, 1000, "Envoy, Finagle",
            "in a row: reacts at once to an outage"),
    Default("admit.breaker.success_rate", 0.8, "", 0, 1, "Linkerd, Finagle",
            "sees the endpoint that fails by halves, which a row never sees"),
    Default("admit.breaker.window", 10.0, "s", 1, 600, "Linkerd",
            "the time over which success is counted"),
    Default("admit.breaker.minimum_calls", 5, "calls", 1, 100_000, "Linkerd",
            "fewer calls in the window say nothing about a rate"),
    Default("admit.breaker.open", (1.0, 60.0), "s", 0.01, 3600, "Linkerd",
            "closed for 1 s, doubled with jitter up to 60 s, then one probe"),
    Default("admit.breaker.max_ejected", 0.5, "", 0, 1, "meshlib",
            "at most half, never the last: Envoy's 10 % protects nothing with 3 endpoints"),
    Default("admit.breaker.slow", 0.0, "s", 0, 3600, "resilience4j",
            "off: what is slow, only you know"),
    Default("admit.breaker.slow_rate", 0.5, "", 0.01, 1, "resilience4j",
            "half of the calls slow is no tail any more"),
    Default("admit.adaptive", "off", "", None, None, "Netflix concurrency-limits, Envoy",
            "a limit that moves by itself has to be watched first"),
    Default("admit.adaptive_limits.initial", 20, "calls", 1, 1_000_000, "Netflix concurrency-limits",
            "where it begins; it finds its level within seconds"),
    Default("admit.adaptive_limits.least", 4, "calls", 1, 1_000_000, "meshlib",
            "with fewer in flight nothing can be measured any more"),
    Default("admit.adaptive_limits.most", 1000, "calls", 1, 1_000_000, "Netflix concurrency-limits",
            "a limit that nothing tests must not grow for ever"),
    Default("admit.throttle", 0.0, "", 0, 10, "Google SRE, chapter 21",
            "off; 2 sends at most two calls for each one that is accepted, and refuses the rest here"),
    Default("admit.throttle_window", 30.0, "s", 1, 600, "meshlib",
            "long enough to know what is accepted, short enough to see that it is over; SRE takes 2 min"),
    Default("admit.rate.per", 1.0, "s", 0.001, 86400, "",
            "most limits are spoken of per second"),
    Default("admit.rate.by", ("service",), "", None, None, "",
            "one limit for all calls of the service"),
    Default("admit.rate.store", "local", "", None, None, "",
            "each process counts for itself: nothing to run, nothing to fail"),
    Default("admit.rate.on_failure", "local", "", None, None, "Envoy, which lets all through",
            "without its store a limit still holds in each process"),
    Default("admit.check.path", "/healthz", "", None, None, "Kubernetes",
            "what most services answer to"),
    Default("admit.check.every", 10.0, "s", 0.1, 3600, "Kubernetes",
            "every process asks every endpoint: it must not become the load"),
    Default("admit.check.timeout", 1.0, "s", 0.01, 600, "Kubernetes",
            "an endpoint that can't say that it is well isn't"),
    Default("admit.check.failures", 3, "failures", 1, 1000, "Kubernetes",
            "in a row: one lost packet is no illness"),
    Default("admit.check.successes", 2, "successes", 1, 1000, "Envoy",
            "in a row: one good answer may be luck"),
    # ------------------------------------------------------------------------------------------------ inbound
    Default("inbound.probes",
            ("/healthz", "/livez", "/readyz", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"),
            "", None, None, "Kubernetes",
            "who is busy is not ill: an overload must not look like a death; rules hold for them as for all others"),
    Default("inbound.queue", 0.5, "", 0, 10, "meshlib",
            "half as many as are served may wait for a place: a burst passes, and an overload is told at once; 0 lets nobody wait"),
    Default("inbound.codel.target", 0.005, "s", 0.0001, 60, "Facebook, Fail at Scale",
            "so long may a call wait when the queue does not empty any more: the others would wait for nothing"),
    Default("inbound.codel.interval", 0.1, "s", 0.001, 60, "Facebook, Fail at Scale",
            "so long may a call wait in a burst; a queue that has not been empty for so long is none"),
    Default("inbound.shares.sheddable", 0.6, "", 0.01, 1, "Google SRE, chapter 21",
            "first to go: what nobody misses when it comes later"),
    Default("inbound.shares.sheddable_plus", 0.75, "", 0.01, 1, "Google SRE, chapter 21",
            "batch work, that tries again by itself"),
    Default("inbound.shares.critical", 0.9, "", 0.01, 1, "Google SRE, chapter 21",
            "what has no priority; a tenth is kept for what is more important"),
    Default("inbound.shares.critical_plus", 1.0, "", 0.01, 1, "Google SRE, chapter 21",
            "the last to go: all there is"),
    Default("inbound.drain.wait", 5.0, "s", 0, 3600, "Kubernetes",
            "so long it takes until nobody sends calls any more to who is not ready; none of them is refused meanwhile"),
    Default("inbound.drain.grace", 20.0, "s", 0, 86400, "Kubernetes",
            "what is in flight gets that long to end: with the wait before it, 5 s less than the 30 after which Kubernetes kills"),
    # ------------------------------------------------------------------------------------------------ registries and the agent
    Default("registries.cache", True, "", None, None, "Consul's agent",
            "what a registry said last is kept in .meshlib/endpoints beside the file, so that a process starts while it is down"),
    Default("delegate", "off", "", None, None, "meshlib",
            "a call has no extra hop unless you say so; `agent` lets the processes of a node share its connections"),
    Default("agent.socket", "/run/meshlib/agent.sock", "", None, None, "SPIRE, which takes /run/spire/sockets",
            "where SPIFFE's clients ask who they are; systemd makes the folder"),
    Default("agent.data", "/run/meshlib/data.sock", "", None, None, "meshlib",
            "where the services of the node hand over their calls; beside the other sockets"),
    Default("agent.admin", "/run/meshlib/admin.sock", "", None, None, "Envoy, whose admin port anybody may ask",
            "where `meshlib agent status` asks; for root and the agent's own user"),
    Default("agent.state", "/var/lib/meshlib", "", None, None, "systemd",
            "what must outlive the agent: its handover key, and identities that were enrolled"),
    Default("agent.workers", 1, "threads", 1, 64, "Envoy, which takes one per core",
            "one thread moves tens of thousands of requests a second, and the other cores are the services'"),
    # ------------------------------------------------------------------------------------------------ stores
    Default("stores.timeout", 0.05, "s", 0.001, 10, "meshlib",
            "every call waits for it, so the store is near, or does not count"),
)
# fmt: on

TABLE: Final[dict[str, Default]] = {row.name: row for row in _ROWS}

# What is said in the code and not in the file has its row here all the same.
IN_CODE: Final = frozenset({"secure.authorizer.timeout"})


def setting(name: str, *, alias: str | None = None) -> Any:
    """The pydantic field of a row: default, range and reason. For a list, `values.span` checks the range."""
    row = TABLE[name]
    is_list = isinstance(row.value, tuple)  # its words become what the field holds
    limits = _limits(row)
    return Field(default=row.value, validate_default=is_list or None, alias=alias, **limits, json_schema_extra=_extra(row))


def override(name: str, whose: str) -> Any:
    """The field of a more special place that may say otherwise: no default, the same range."""
    row = TABLE[name]
    described = {**_limits(row), "description": f"Over the {whose}'s."}
    return Field(default=None, **described, json_schema_extra=_extra(row))


DURATION: Final = r"[0-9]+(\.[0-9]+)? ?(ms|s|m|h)"


def _limits(row: Default) -> dict[str, Any]:
    is_list = isinstance(row.value, tuple)
    return {
        "ge": None if is_list else row.least,
        "le": None if is_list else row.most,
        "description": f"{row.reason[0].upper()}{row.reason[1:]}." + (f" As in {row.source}." if row.source else ""),
    }


def _extra(row: Default) -> dict[str, Any]:
    """What pydantic can't tell a JSON Schema by itself: the row, and the two ways in which durations are written."""
    extra: dict[str, Any] = {"x-default-of": row.name}
    if row.unit:
        extra["x-unit"] = row.unit
    item: dict[str, Any] = {"minimum": row.least, "maximum": row.most}
    if row.unit == "s":
        item = {"anyOf": [{"type": "number", **item}, {"type": "string", "pattern": f"^{DURATION}$"}]}
    if isinstance(row.value, tuple):
        # A pair of durations, or a list of any length; of words pydantic knows all there is.
        if row.unit == "s":
            extra["prefixItems"] = [item, item]
        elif row.least is not None:
            extra["items"] = {"type": "integer", **item}
    elif row.unit == "s":
        extra.update(item)
    return extra
