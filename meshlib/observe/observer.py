"""What do the two ways tell, and to whom?

One object that both ways call: headers and spans on the way out, a span around the handler on the way in, the few
numbers that no engine counts, and the text of all metrics. Without a tracing SDK the observer only carries the trace;
the engines count by themselves. It decides nothing about a call, and a failure to observe is never a failure of the
call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from meshlib._native import core
from meshlib.call import current_visit

from . import spans
from .prometheus import Readings, render
from .trace import TRACEPARENT, Headers, Sampler, Trace, current_trace, here, new_number, outgoing

if TYPE_CHECKING:
    from meshlib.config import Config
    from meshlib.mesh import Mesh

logger = logging.getLogger("meshlib.observe")

# A sampler or an exporter of the application raised.
NO_SPAN: Final = "a span could not be made; the call goes on without it"
MOST_HOSTS: Final = 100
# Pairs of a service or peer and a method with series of their own: others may choose both.
MOST_SPEAKERS: Final = 1000
OTHER: Final = "other"

# Of all observers, since it is held for a moment and must be free in a forked child.
_lock = threading.Lock()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)

# The span of the attempt that is about to be sent, between `client_span` and `client_headers` of the same task.
_begun: ContextVar[spans.ClientSpan | None] = ContextVar("meshlib.begun", default=None)


class Observer:
    """Observes the calls of one process. `service` is who we are, `sample` the share of new traces that are sampled."""

    __slots__ = ("_egress", "_messages", "_templates", "sample", "sampler", "service")

    def __init__(self, *, service: str = "", sample: float = 1.0) -> None:
        self.service = service
        self.sample = sample
        self.sampler = Sampler(sample)
        self._egress: dict[str, int] = {}
        self._messages: dict[tuple[str, str, str], core.Tally] = {}
        self._templates: dict[str, str] = {}

    def use(self, config: Config) -> None:
        """What a configuration says about our own routes: a span tells the template that a route matches, and not its name."""
        self._templates = {route.name: _template(route.match.path) for route in config.own.routes if route.match.path is not None}

    # ------------------------------------------------------------------ out

    # The tracer if the application configured a tracing SDK, so that a span is worth asking for.
    recorder = staticmethod(spans.tracer)

    def carried(self, is_recording: bool) -> Headers | None:
        """The headers of the trace that a call without a span of its own belongs to; None where it is the first of its trace.

        The list is shared: add it to another, don't change it.
        """
        if is_recording:
            headers = spans.current_headers()
            if headers is not None:
                return headers
        trace = here(self.sampler)
        return None if trace is None else trace.found.inner_headers

    def fresh(self) -> float | None:
        """The share of new traces that are sampled, where nobody records and what runs now is part of no trace; None elsewhere."""
        if current_trace.get() is not None or current_visit.get() is not None or spans.tracer() is not None:
            return None
        return self.sample

    def client_span(
        self,
        method: str,
        authority: str,
        resend_count: int = 0,
        *,
        target: str = "",
        endpoint: str = "",
        rpc: str = "",
    ) -> spans.ClientSpan | None:
        """A span for one attempt, to be ended with `end(status, error)`; None where nobody records.

        `rpc` is the full method of a gRPC call ("/pkg.Service/Method").
        """
        tracer = spans.tracer()
        if tracer is None:
            return None
        trace = here(self.sampler)
        span = None
        try:
            span = spans.client_span(
                tracer,
                method,
                authority,
                resend_count,
                target=target,
                endpoint=endpoint,
                rpc=rpc,
                baggage=[] if trace is None else trace.found.baggage,
            )
        except Exception:
            logger.warning(NO_SPAN, exc_info=True)
        _begun.set(span)
        return span

    def client_headers(self, present: Iterable[tuple[bytes, bytes]] = (), *, is_egress: bool = False) -> Headers:
        """The headers that carry the trace, for the attempt that `client_span` began just now.

        `present` are the headers that the call has already: who wrote a traceparent by hand is not contradicted.
        """
        if present and any(name.lower() == TRACEPARENT for name, _ in present if len(name) == len(TRACEPARENT)):
            return []
        if spans.tracer() is not None:
            span = _begun.get()
            if span is not None:
                _begun.set(None)
                return span.headers
            headers = spans.current_headers()
            if headers is not None:
                return headers
        return outgoing(self.sampler, is_inner=not is_egress)

    def egress(self, host: str) -> None:
        """A call went to a host that is no service. Counted for the first hundred hosts, then as "other"."""
        with _lock:
            if host not in self._egress and len(self._egress) >= MOST_HOSTS:
                host = OTHER
            self._egress[host] = self._egress.get(host, 0) + 1

    # ------------------------------------------------------------------ both

    def tally(self, side: str, name: str, method: str) -> core.Tally:
        """Where the messages of gRPC calls that are over are counted. `side` is "client" or "server", `name` the service that was
        called or the identity that called ("" for none), `method` the full one ("/pkg.Service/Method").

        The first thousand pairs have a series each, what comes after them is "other".
        """
        key = (side, name, method)
        found = self._messages.get(key)
        if found is None:
            with _lock:
                if key not in self._messages and len(self._messages) >= MOST_SPEAKERS:
                    key = (side, OTHER, OTHER)
                found = self._messages.setdefault(key, core.Tally())
        return found

    # ------------------------------------------------------------------ in

    def server_span(
        self,
        method: str,
        route: str,
        headers: Headers,
        peer: str | None,
        *,
        path: str = "",
        scheme: str = "",
        rpc: str = "",
        is_known: bool = True,
        number: int | None = None,
    ) -> Trace | spans.ServerSpan | spans.QuietSpan:
        """A context manager around the handler. `peer` is the proved SPIFFE ID of the caller, or nothing.

        Set its `status` before it ends. With an SDK it is a SERVER span; without one, or where another instrumentation
        made the span, it only holds the trace. `rpc` is the full method of a gRPC call, and `is_known` if it has a handler.
        """
        trace = Trace(headers, self.sampler, is_trusted=bool(peer), number=number)
        tracer = spans.tracer()
        if tracer is None:
            return trace
        span = None
        try:
            known = self._templates.get(route, route)
            span = spans.server_span(
                tracer, method, known, trace, peer=peer or "", path=path, scheme=scheme, rpc=rpc, is_known=is_known
            )
        except Exception:
            logger.warning(NO_SPAN, exc_info=True)
        return trace if span is None else span

    def draw(self) -> tuple[int, bool]:
        """For a call of which no trace is known: of which number its ids are made, and whether it is recorded."""
        number = new_number()
        return number, self.sampler.begins(number)

    # ------------------------------------------------------------------ numbers

    def prometheus(self, mesh: Mesh, *, is_openmetrics: bool = False) -> str:
        """Everything that a mesh and its process have counted, as text."""
        return render(self.readings(mesh, time.monotonic()), is_openmetrics=is_openmetrics)

    def readings(self, mesh: Mesh, now: float) -> Readings:
        """All numbers as plain data."""
        from meshlib._native import EXPECTED

        config, identity = mesh.config, mesh.identity
        with _lock:
            egress = dict(self._egress)
            messages = {key: tally.read() for key, tally in self._messages.items()}
        shared, checker = (mesh.outbound.rates, getattr(mesh, "inbound_rates", None)), mesh.checker
        # What a mesh of a test need not have.
        watch, trust = getattr(mesh, "watch", None), getattr(mesh, "trust", None)
        federation, keys = (None, None) if trust is None else (trust.federation, trust.keys)
        delegation, handed = mesh.outbound.delegation, getattr(mesh, "handed", None)
        current = None if identity is None else identity.current
        known: dict[str, Any] | None = None
        if identity is not None:
            known = {
                "rotations": identity.rotations,
                "failures": identity.failures,
                "not_after": None if current is None else current.not_after,
                "spent": identity.spent,
            }
        return Readings(
            engine=mesh.engine.stats(now),
            gate=mesh.gate.stats(),
            house=mesh.gate.load(),
            discover=mesh.directory.stats(now),
            registered=_registered(mesh),
            jobs=[(job.name, job.runs, job.failures) for job in mesh.keeper.jobs],
            identity=known,
            egress=egress,
            delegated=None if delegation is None else delegation.stats(),
            handed=None if handed is None else handed.stats(),
            messages=messages,
            plain=[] if watch is None else watch.plain,
            authorizers=[] if trust is None else trust.authorizers.stats(),
            keys=[] if keys is None else keys.stats(),
            bundles=[] if federation is None else federation.stats(),
            alarms=None if identity is None else frozenset(alarm.kind for alarm in identity.alarms),
            alerts={} if watch is None else watch.alerts.counts,
            tls={} if identity is None else identity.tls_stats(),
            pools=mesh.outbound.ledger.stats(),
            rates=[row for rates in shared if rates is not None for row in rates.stats()],
            checks=[] if checker is None else checker.stats(),
            fallbacks=mesh.fallbacks,
            reloads=mesh.reloads,
            reload_failures=mesh.reload_failures,
            mesh=config.name,
            service=config.service,
            version=EXPECTED,
            protocols={name: policy.protocol for name, policy in config.services.items()},
            templates={route.name: _template(route.match.path) for route in config.own.routes},
            scheme={"enforce": "https", "observe": "http"}.get(config.own.mode, ""),
        )


def _registered(mesh: Mesh) -> dict[str, Any] | None:
    """Whether this process is in its registry; None as long as it doesn't serve."""
    registrar, register = getattr(mesh, "registrar", None), mesh.config.own.register
    if registrar is None or register is None or not registrar.is_wanted:
        return None
    return {
        "service": mesh.config.service,
        "registry": register.registry,
        "is_entered": registrar.is_entered,
        "failures": registrar.failures,
    }


def _template(path: Any) -> str:
    """What a route matches, in the form of http.route."""
    if path is None:
        return "/*"
    return str(path.exact or path.template or path.prefix.rstrip("/") + "/*")
