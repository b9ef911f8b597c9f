"""What is every number called, and what does it mean?

One table of all metrics, with kind, unit, labels and help, and the names of OpenTelemetry's attributes beside it, so
that a renaming of the conventions is a change of this file. Our own metrics begin with `meshlib_` and the phase that
counts them; units are seconds and plain counts. The durations carry the names that OpenTelemetry gives them in
Prometheus, and its buckets.

Calls (what the application asked) and attempts (what the wire saw) are different metrics: retries lie between them.
`direction` is never a label: what goes out is counted by `service` and `endpoint`, what comes in by `route`, `method`
and `peer`. A guard of functions is a service `guard:<name>` with the one endpoint `<name>`; its codes are `ok`, `error` and
`none`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. The name of a counter ends with `_total`, that of a unit stands before it."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""


# Upper bounds in seconds; the same as in the core, which adds a last bucket for the rest.
BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

# ---------------------------------------------------------------------- discover

_WHERE = ("service", "source")
DISCOVER_ENDPOINTS = Metric("meshlib_discover_endpoints", "gauge", "Endpoints in use.", _WHERE)
DISCOVER_AGE = Metric(
    "meshlib_discover_age_seconds",
    "gauge",
    "For how long no answer has confirmed the endpoints in use.",
    _WHERE,
    "seconds",
)
DISCOVER_FAILURES = Metric("meshlib_discover_failures_total", "counter", "Looks without an answer.", _WHERE)
DISCOVER_READY = Metric("meshlib_discover_ready", "gauge", "1 once the source has answered in this process.", _WHERE)
DISCOVER_CHANGES = Metric("meshlib_discover_changes_total", "counter", "Versions of the endpoints that were put in use.", _WHERE)
DISCOVER_KEPT = Metric("meshlib_discover_kept", "gauge", "Endpoints in use that the source does not tell any more.", _WHERE)
DISCOVER_CACHE_FAILURES = Metric(
    "meshlib_discover_cache_failures_total", "counter", "Times that the endpoints could not be kept on disk.", _WHERE
)
DISCOVER_HELD = Metric("meshlib_discover_held", "gauge", "1 while an answer that takes away too much is held back.", _WHERE)
DISCOVER_HOLDS = Metric("meshlib_discover_holds_total", "counter", "Answers that were held back.", _WHERE)
_ENTRY = ("service", "registry")
DISCOVER_REGISTERED = Metric(
    "meshlib_discover_registered", "gauge", "1 while this process, which serves, is entered in its registry.", _ENTRY
)
DISCOVER_REGISTRATION_FAILURES = Metric(
    "meshlib_discover_registration_failures_total", "counter", "Times that this process could not be entered.", _ENTRY
)

# ---------------------------------------------------------------------- out: calls, by service

_SERVICE = ("service",)
ROUTE_REQUESTS = Metric("meshlib_route_requests_total", "counter", "Calls to a service, as the application asked.", _SERVICE)
ROUTE_FAILURES = Metric("meshlib_route_failures_total", "counter", "Calls that failed, as the application saw.", _SERVICE)
ROUTE_RESPONSES = Metric(
    "meshlib_route_responses_total",
    "counter",
    "Calls by the status that the application got; code none where no answer came.",
    ("service", "code"),
)
ROUTE_EGRESS = Metric("meshlib_route_egress_total", "counter", "Calls to hosts that are no service of the mesh.", ("host",))
_STREAM = ("service", "method")
ROUTE_MESSAGES_SENT = Metric(
    "meshlib_route_messages_sent_total", "counter", "Messages that calls over gRPC sent to a service.", _STREAM
)
ROUTE_MESSAGES_RECEIVED = Metric(
    "meshlib_route_messages_received_total", "counter", "Messages that a service sent as answers to calls over gRPC.", _STREAM
)
RETRY_ATTEMPTS = Metric("meshlib_retry_attempts_total", "counter", "Attempts beyond the first of a call.", _SERVICE)
RETRY_BUDGET = Metric("meshlib_retry_budget_remaining", "gauge", "Retries that the budget would allow at this moment.", _SERVICE)
RETRY_HEDGES = Metric(
    "meshlib_retry_hedges_total", "counter", "Attempts sent beside one that was slow; they count as attempts, too.", _SERVICE
)
RETRY_HEDGE_DELAY = Metric(
    "meshlib_retry_hedge_delay_seconds",
    "gauge",
    "After how long an attempt is slow, by what the service has taken so far.",
    _SERVICE,
    "seconds",
)
RETRY_FALLBACKS = Metric(
    "meshlib_retry_fallbacks_total",
    "counter",
    "Calls that were answered by their fallback: value, last_good or callable.",
    ("service", "kind"),
)
GUARD_DURATION = Metric(
    "meshlib_retry_guard_duration_seconds",
    "histogram",
    "Calls of guarded functions, from the beginning to the end of the last one.",
    _SERVICE,
    "seconds",
)
BALANCE_PANICS = Metric(
    "meshlib_balance_panics_total",
    "counter",
    "Choices for which health was ignored, since too few endpoints were healthy.",
    _SERVICE,
)
ADMIT_IN_FLIGHT = Metric("meshlib_admit_in_flight", "gauge", "Calls to a service under way.", _SERVICE)
ADMIT_LIMIT = Metric(
    "meshlib_admit_limit",
    "gauge",
    "Calls to a service that may be under way at once; where the limit is adaptive, what it has learnt.",
    _SERVICE,
)
ADMIT_PENDING = Metric("meshlib_admit_pending", "gauge", "Calls that wait until they may be under way.", _SERVICE)
ADMIT_REFUSED = Metric(
    "meshlib_admit_refused_total",
    "counter",
    "Calls that were refused before their first attempt. Reason limit: too many were under way; throttle: the service refuses most "
    "of what it gets; rate: too many in a time, by this process's own count.",
    ("service", "reason"),
)
_RATE = ("service", "rate")
ADMIT_RATE_ASKED = Metric(
    "meshlib_admit_rate_asked_total", "counter", "Calls for which the store of a shared rate was asked.", _RATE
)
ADMIT_RATE_REFUSED = Metric("meshlib_admit_rate_refused_total", "counter", "Calls that a shared rate refused.", _RATE)
ADMIT_RATE_FAILED = Metric("meshlib_admit_rate_failed_total", "counter", "Questions that the store did not answer.", _RATE)
ADMIT_RATE_SKIPPED = Metric(
    "meshlib_admit_rate_skipped_total", "counter", "Calls for which the store was not asked, since it was away.", _RATE
)
ADMIT_STORE_AWAY = Metric(
    "meshlib_admit_store_away", "gauge", "1 while a store of shared rates does not answer and is left alone.", ("store",)
)
ADMIT_CHECKS = Metric("meshlib_admit_checks_total", "counter", "Active health checks of endpoints.", _SERVICE)
ADMIT_CHECK_FAILURES = Metric("meshlib_admit_check_failures_total", "counter", "Active health checks that failed.", _SERVICE)
ADMIT_CHECKS_SKIPPED = Metric(
    "meshlib_admit_checks_skipped_total", "counter", "Active health checks that could not be made.", _SERVICE
)
ADMIT_CHECKS_FAILING = Metric(
    "meshlib_admit_checks_failing", "gauge", "Endpoints that are taken out, since they fail their health checks.", _SERVICE
)

# ---------------------------------------------------------------------- out: attempts, by endpoint

_ENDPOINT = ("service", "endpoint")
BALANCE_REQUESTS = Metric("meshlib_balance_requests_total", "counter", "Attempts at an endpoint.", _ENDPOINT)
BALANCE_FAILURES = Metric("meshlib_balance_failures_total", "counter", "Attempts that failed.", _ENDPOINT)
BALANCE_RESPONSES = Metric(
    "meshlib_balance_responses_total",
    "counter",
    "Attempts by status; code none where no answer came.",
    ("service", "endpoint", "code"),
)
BALANCE_RETRIED = Metric(
    "meshlib_balance_retried_total", "counter", "Attempts after which the call was tried again elsewhere.", _ENDPOINT
)
BALANCE_IN_FLIGHT = Metric("meshlib_balance_in_flight", "gauge", "Attempts at an endpoint under way.", _ENDPOINT)
BALANCE_LATENCY = Metric(
    "meshlib_balance_latency_seconds",
    "gauge",
    "The latency by which the balancer judges an endpoint (peak-EWMA).",
    _ENDPOINT,
    "seconds",
)
BALANCE_WEIGHT = Metric("meshlib_balance_weight", "gauge", "The weight that discovery gave an endpoint.", _ENDPOINT)
BALANCE_ENDPOINT = Metric(
    "meshlib_balance_endpoint_info",
    "gauge",
    "Where an endpoint is; only where its zone is known.",
    (*_ENDPOINT, "zone"),
)
ADMIT_BREAKER = Metric(
    "meshlib_admit_breaker_state",
    "gauge",
    "Breaker of an endpoint: 0 closed, 1 half open, 2 open, 3 isolated by hand, 4 failing its health checks.",
    _ENDPOINT,
)
ADMIT_EJECTIONS = Metric("meshlib_admit_ejections_total", "counter", "How often an endpoint was taken out.", _ENDPOINT)

BREAKER_STATES: Final = {"closed": 0, "half_open": 1, "open": 2, "isolated": 3, "failing": 4}

# ---------------------------------------------------------------------- in: by caller

_CALLER = ("service", "route", "method", "peer")
SECURE_REQUESTS = Metric("meshlib_secure_requests_total", "counter", "Calls that came in, by who was proved to call.", _CALLER)
SECURE_RESPONSES = Metric(
    "meshlib_secure_responses_total",
    "counter",
    "Calls that came in, by the status sent (of gRPC the word); code none where the client was gone before.",
    (*_CALLER, "code"),
)
SECURE_REFUSED = Metric("meshlib_secure_refused_total", "counter", "Calls that never reached the application.", _CALLER)
SECURE_WOULD_DENY = Metric(
    "meshlib_secure_would_deny_total",
    "counter",
    "Calls that were let through, and that mode enforce would refuse.",
    _CALLER,
)
SECURE_IN_FLIGHT = Metric("meshlib_secure_in_flight", "gauge", "Calls in the application's hands.", _CALLER)
_SPEAKER = ("service", "method", "peer")
SECURE_MESSAGES_RECEIVED = Metric(
    "meshlib_secure_messages_received_total",
    "counter",
    "Messages that came in with calls over gRPC, by who was proved to call.",
    _SPEAKER,
)
SECURE_MESSAGES_SENT = Metric(
    "meshlib_secure_messages_sent_total", "counter", "Messages that were sent as answers to calls over gRPC.", _SPEAKER
)

ADMIT_INBOUND_LIMIT = Metric(
    "meshlib_admit_inbound_limit",
    "gauge",
    "Calls that may be in the application's hands at once; where the limit is adaptive, what it has learnt.",
)
ADMIT_INBOUND_WAITING = Metric("meshlib_admit_inbound_waiting", "gauge", "Calls that came in and wait for a place.")
SECURE_PLAIN = Metric(
    "meshlib_secure_plain_total",
    "counter",
    "Calls that came in without TLS, by the address that they came from (the first hundred; then other).",
    ("client",),
)
SECURE_AUTHORIZER = Metric(
    "meshlib_secure_authorizer_total",
    "counter",
    "Questions to the authorizers of CUSTOM rules. Outcome allowed or denied: its answer; timeout, error, full (too many wait) and "
    "unknown (not registered) deny as well.",
    ("authorizer", "outcome"),
)

# ---------------------------------------------------------------------- who is believed

_PROVIDER = ("provider",)
SECURE_KEYS = Metric(
    "meshlib_secure_token_keys",
    "gauge",
    "Keys in force for the tokens of a provider; with 0 its tokens are refused.",
    _PROVIDER,
)
SECURE_KEYS_AGE = Metric(
    "meshlib_secure_token_keys_age_seconds",
    "gauge",
    "For how long no good answer has confirmed the keys in force. Not for keys that stand in the configuration.",
    _PROVIDER,
    "seconds",
)
SECURE_KEYS_FAILURES = Metric(
    "meshlib_secure_token_keys_failures_total",
    "counter",
    "Fetches of a provider's keys that failed; of a file, faults that were met.",
    _PROVIDER,
)
_DOMAIN = ("trust_domain",)
SECURE_BUNDLE_AGE = Metric(
    "meshlib_secure_bundle_age_seconds",
    "gauge",
    "For how long no good answer has confirmed the bundle of another trust domain; before the first, since we began to ask.",
    _DOMAIN,
    "seconds",
)
SECURE_BUNDLE_FAILURES = Metric(
    "meshlib_secure_bundle_failures_total",
    "counter",
    "Fetches of another trust domain's bundle that failed; of a file, faults that were met.",
    _DOMAIN,
)
IDENTITY_ALARMS = Metric(
    "meshlib_secure_identity_alarms",
    "gauge",
    "1 while something isn't well about our identity. Kind life: near its end and not renewed; expired; clock: set back; withdrawn; "
    "revocations: a list is out of date; note: a part was left out or is old; federation: a bundle is missing or old.",
    ("kind",),
)

ALARM_KINDS: Final = ("life", "expired", "clock", "withdrawn", "revocations", "note", "federation")

# ---------------------------------------------------------------------- the process

IDENTITY_ROTATIONS = Metric("meshlib_secure_rotations_total", "counter", "Certificates taken into use after the first.")
IDENTITY_FAILURES = Metric(
    "meshlib_secure_rotation_failures_total",
    "counter",
    "Failed attempts to load the identity; the last good one stays.",
)
IDENTITY_EXPIRY = Metric(
    "meshlib_secure_expiry_timestamp_seconds", "gauge", "When the certificate ends, in Unix time.", (), "seconds"
)
SECURE_CLIENT_HANDSHAKES = Metric(
    "meshlib_secure_client_handshakes_total",
    "counter",
    "TLS handshakes with servers, by whether an earlier session was resumed.",
    ("resumed",),
)
SECURE_CLIENT_FAILURES = Metric(
    "meshlib_secure_client_handshake_failures_total",
    "counter",
    "TLS handshakes with servers that failed. Reason identity: it did not prove who it must be; refused: it refused our "
    "certificate; protocol: it speaks no TLS that we speak; lost: broken off.",
    ("reason",),
)
SECURE_SERVER_HANDSHAKES = Metric(
    "meshlib_secure_server_handshakes_total",
    "counter",
    "TLS handshakes with clients, by whether an earlier session was resumed.",
    ("resumed",),
)
SECURE_SERVER_FAILURES = Metric(
    "meshlib_secure_server_handshake_failures_total",
    "counter",
    "TLS handshakes with clients that failed; reasons as for servers.",
    ("reason",),
)
SECURE_TICKETS = Metric(
    "meshlib_secure_tickets_total",
    "counter",
    "Session tickets won from servers, by what became of them: stored, used, expired or evicted.",
    ("event",),
)
ADMIT_CONNECTIONS_IDLE = Metric("meshlib_admit_connections_idle", "gauge", "Connections that wait for their next exchange.")
ADMIT_CONNECTIONS_OPENED = Metric("meshlib_admit_connections_opened_total", "counter", "Connections opened to endpoints.")
ADMIT_CONNECTIONS_REUSED = Metric("meshlib_admit_connections_reused_total", "counter", "Exchanges that found an open connection.")
ADMIT_CONNECTIONS_CLOSED = Metric(
    "meshlib_admit_connections_closed_total",
    "counter",
    "Waiting or returning connections that were closed. Reason idle, age, certificate or generation: its time was over; full: "
    "too many waited; peer: closed by it; unfit: in no state to carry another exchange; shutdown: the client was closed.",
    ("reason",),
)
ADMIT_DELEGATED = Metric(
    "meshlib_admit_delegated_total",
    "counter",
    "Attempts of delegated services. By agent: handed to the node agent; the others were sent by this process, since the agent was known "
    "to be away, was gone, slow to accept (full), silent, had closed the connection under the attempt, or said that it is unable.",
    ("by",),
)
ADMIT_AGENT_UP = Metric("meshlib_admit_agent_up", "gauge", "Whether the node agent answers to this process.")
ADMIT_AGENT_CHANGES = Metric(
    "meshlib_admit_agent_changes_total", "counter", "How often the node agent came (up) and went (away).", ("state",)
)
SECURE_HANDED = Metric(
    "meshlib_secure_handed_total",
    "counter",
    "Calls with the node agent's word for who calls. Result taken: its secret was right; wrong: it was not, and counts for nothing.",
    ("result",),
)
IDENTITY_SPENT = Metric(
    "meshlib_secure_spent_ratio", "gauge", "Share of the certificate's life that is gone; renewed at 0.5.", (), "ratio"
)
OBSERVE_INFO = Metric("meshlib_observe_info", "gauge", "What runs here.", ("mesh", "service", "version"))
OBSERVE_RELOADS = Metric("meshlib_observe_reloads_total", "counter", "Configurations taken into use after the first.")
OBSERVE_RELOAD_FAILURES = Metric(
    "meshlib_observe_reload_failures_total", "counter", "Configurations refused; the old one stays in force."
)
OBSERVE_ALERTS = Metric(
    "meshlib_observe_alerts_total",
    "counter",
    "What somebody should look at. Kind mtls_lost: an edge that was private is not; new_peer: a caller that was never seen; "
    "certificate: ours is near its end and nothing renewed it.",
    ("kind",),
)
OBSERVE_JOB_RUNS = Metric("meshlib_observe_job_runs_total", "counter", "Runs of the keeper's jobs.", ("job",))
OBSERVE_JOB_FAILURES = Metric("meshlib_observe_job_failures_total", "counter", "Runs that failed.", ("job",))

# ---------------------------------------------------------------------- durations, as OpenTelemetry names them

HTTP_CLIENT_DURATION = Metric(
    "http_client_request_duration_seconds",
    "histogram",
    "Calls over HTTP, from the beginning to the head of the last answer.",
    ("http_request_method", "server_address"),
    "seconds",
)
HTTP_SERVER_DURATION = Metric(
    "http_server_request_duration_seconds",
    "histogram",
    "Requests that the application answered.",
    ("http_request_method", "http_route", "url_scheme"),
    "seconds",
)
RPC_CLIENT_DURATION = Metric(
    "rpc_client_call_duration_seconds",
    "histogram",
    "Calls over gRPC, from the beginning to the head of the last answer.",
    ("rpc_system_name", "server_address"),
    "seconds",
)
RPC_SERVER_DURATION = Metric(
    "rpc_server_call_duration_seconds",
    "histogram",
    "RPCs that the application answered.",
    ("rpc_system_name", "rpc_method"),
    "seconds",
)

METRICS: Final[tuple[Metric, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

# ---------------------------------------------------------------------- attributes of spans

HTTP_METHOD: Final = "http.request.method"
HTTP_METHOD_ORIGINAL: Final = "http.request.method_original"
HTTP_RESEND_COUNT: Final = "http.request.resend_count"
HTTP_STATUS: Final = "http.response.status_code"
HTTP_ROUTE: Final = "http.route"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
PEER_ADDRESS: Final = "network.peer.address"
PEER_PORT: Final = "network.peer.port"
URL_FULL: Final = "url.full"
URL_PATH: Final = "url.path"
URL_SCHEME: Final = "url.scheme"
ERROR_TYPE: Final = "error.type"
TLS_RESUMED: Final = "tls.resumed"
CARRIED_BY: Final = "meshlib.carried_by"
RPC_SYSTEM: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_METHOD_ORIGINAL: Final = "rpc.method_original"
RPC_STATUS: Final = "rpc.response.status_code"
# Of the messages of one call the conventions count none (their events tell each of them); so these are our own.
MESSAGES_SENT: Final = "meshlib.messages.sent"
MESSAGES_RECEIVED: Final = "meshlib.messages.received"
MESH_ROUTE: Final = "meshlib.route"
MESH_PEER: Final = "meshlib.peer"

# gRPC's statuses in the order of their numbers, as the conventions write them.
GRPC_STATUSES: Final = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED"),
    *("RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE"),
    *("DATA_LOSS", "UNAUTHENTICATED"),
)
# Those of them that are the server's fault; to who called, all but OK are errors.
GRPC_FAULTS: Final = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

# Methods that HTTP and PATCH define; others are "_OTHER", lest a caller should invent time series.
KNOWN_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
OTHER_METHOD: Final = "_OTHER"
