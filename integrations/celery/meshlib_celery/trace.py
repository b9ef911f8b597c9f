"""To which trace does a task belong?

To that of whoever sent it: W3C's `traceparent` and `tracestate` are headers of the message. Where OpenTelemetry's SDK records, there is a
PRODUCER span for the sending and a CONSUMER span for the run, as its semantic conventions for messaging say; where it doesn't, what came in
goes out with the calls of the task. Where OpenTelemetry's own CeleryInstrumentor is at work, it makes the spans and writes the headers, and
nothing is done here. Baggage doesn't travel: a queue is no service of the mesh.

Headers of a message are a stranger's, unless its sender is proved: then only, the sampled flag counts. Id, routing key and retries are told
in a span as the message says them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from opentelemetry import context, trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from meshlib import Mesh, Peer

CARRIERS: Final = ("traceparent", "tracestate")
_INSTRUMENTATION: Final = "opentelemetry.instrumentation.celery"
_w3c: Final = TraceContextTextMapPropagator()


def send(mesh: Mesh, name: str, headers: MutableMapping[str, Any], where: str, *, is_again: bool) -> Any:
    """Write the trace into the headers of a message that goes out; the span of the sending, to be ended, if there is one.

    `is_again`: the same task in another message. Its headers are those of the first.
    """
    is_recording = mesh.observer.recorder() is not None
    if is_recording and _is_instrumented():
        return None
    if is_again:
        for carrier in CARRIERS:
            headers.pop(carrier, None)
    elif CARRIERS[0] in headers:
        # Who wrote it by hand is not contradicted.
        return None
    if not is_recording:
        for field, value in mesh.observer.carried(False) or ():
            if field.decode() in CARRIERS:
                headers[field.decode()] = value.decode("latin-1")
        return None
    span = trace.get_tracer("meshlib_celery").start_span(f"send {name}", kind=SpanKind.PRODUCER)
    _describe(span, name, str(headers.get("id")), "send", where)
    _w3c.inject(headers, trace.set_span_in_context(span))
    return span


def begin(mesh: Mesh, task: Any, sender: Peer | None) -> Callable[[Any, Any], object] | None:
    """A task begins: what it calls belongs to its trace. To be ended with its state and what it returned or raised."""
    request = task.request
    told = {carrier: value for carrier in CARRIERS if isinstance(value := vars(request).get(carrier), str)}
    if mesh.observer.recorder() is None:
        headers = [(field.encode(), value.encode("latin-1", "replace")) for field, value in told.items()]
        held = mesh.observer.server_span("", "", headers, sender.spiffe_id if sender is not None else None)
        held.__enter__()
        return lambda state, result: held.end(0)
    if _is_instrumented():
        return None
    span = trace.get_tracer("meshlib_celery").start_span(
        f"process {task.name}", context=_parent(mesh, told, is_trusted=sender is not None), kind=SpanKind.CONSUMER
    )
    delivery = vars(request).get("delivery_info")
    where = str(delivery.get("routing_key") or "") if isinstance(delivery, dict) else ""
    _describe(span, task.name, str(request.id), "process", where)
    if sender is not None:
        span.set_attribute("meshlib.peer", sender.spiffe_id)
    if type(request.retries) is int and request.retries > 0:
        span.set_attribute("celery.retries", request.retries)
    token = context.attach(trace.set_span_in_context(span))

    def end(state: Any, result: Any) -> None:
        context.detach(token)
        if state == "FAILURE":
            kind = type(result)
            span.set_attribute("error.type", f"{kind.__module__}.{kind.__qualname__}")
            # The text may hold what a user sent: the type is enough, and the worker's log has the rest.
            span.set_status(Status(StatusCode.ERROR))
        if state:
            span.set_attribute("celery.state", str(state))
        span.end()

    return end


def _parent(mesh: Mesh, told: dict[str, str], *, is_trusted: bool) -> Any:
    above = _w3c.extract(told)
    found = trace.get_current_span(above).get_span_context()
    if is_trusted or not found.is_valid:
        return above
    flags = TraceFlags.SAMPLED if mesh.observer.sampler.is_sampled(found.trace_id) else TraceFlags.DEFAULT
    judged = SpanContext(
        found.trace_id, found.span_id, is_remote=True, trace_flags=TraceFlags(flags), trace_state=found.trace_state
    )
    return trace.set_span_in_context(NonRecordingSpan(judged))


def _describe(span: Any, name: str, task_id: str, kind: str, where: str) -> None:
    span.set_attributes(
        {
            "messaging.system": "celery",
            "messaging.operation.type": kind,
            "messaging.message.id": task_id,
            "messaging.destination.name": where,
            "celery.task_name": name,
        }
    )


def _is_instrumented() -> bool:
    module = sys.modules.get(_INSTRUMENTATION)
    return module is not None and bool(module.CeleryInstrumentor().is_instrumented_by_opentelemetry)


def flush() -> None:
    """Send what is waiting in the SDK: a process of a pool ends without the interpreter's own end, and what waits would be lost."""
    from opentelemetry import _logs, metrics

    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider(), _logs.get_logger_provider()):
        force = getattr(provider, "force_flush", None)
        if force is not None:
            force()
