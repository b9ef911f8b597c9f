"""The trace of a call is carried on by the letter of W3C Trace Context, and strangers can't abuse it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlib.observe import Observer
from meshlib.observe.trace import (
    LONGEST_BAGGAGE,
    Sampler,
    Trace,
    check_baggage,
    check_tracestate,
    current_trace,
    outgoing,
    parse_traceparent,
)

TRACE = b"4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = b"00f067aa0ba902b7"
PARENT = b"00-" + TRACE + b"-" + SPAN + b"-01"
ALL, NONE = Sampler(1.0), Sampler(0.0)
PEER = "spiffe://shop.internal/ns/default/sa/storefront"

Headers = list[tuple[bytes, bytes]]


def passed_on(headers: Headers, *, is_trusted: bool = True, sampler: Sampler = ALL, is_inner: bool = True) -> Headers:
    """What a call made by the handler of such a call carries."""
    with Trace(headers, sampler, is_trusted=is_trusted):
        return outgoing(sampler, is_inner=is_inner)


# ---------------------------------------------------------------------- traceparent


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (PARENT, (TRACE, SPAN, True)),
        (PARENT[:-2] + b"00", (TRACE, SPAN, False)),
        (PARENT[:-2] + b"03", (TRACE, SPAN, True)),  # other flags say nothing about sampling
        (PARENT[:-2] + b"fe", (TRACE, SPAN, False)),
        (b"cc" + PARENT[2:], (TRACE, SPAN, True)),  # a later version
        (b"cc" + PARENT[2:] + b"-what-the-future-brings", (TRACE, SPAN, True)),
        (b"cc" + PARENT[2:] + b".what", None),
        (b"cc" + PARENT[2:] + b"-" + b"x" * 600, None),
        (b"ff" + PARENT[2:], None),
        (PARENT + b"-x", None),
        (PARENT + b" ", None),
        (PARENT.upper(), None),
        (PARENT[:-1], None),
        (b"00-" + b"0" * 32 + b"-" + SPAN + b"-01", None),
        (b"00-" + TRACE + b"-" + b"0" * 16 + b"-01", None),
        (b"x" * 2048, None),
        (b"", None),
        ("00-٤bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".encode(), None),
    ],
)
def test_traceparent_is_read_strictly(value: bytes, expected: object) -> None:
    """Valid ones are read, later versions as this one; everything else is no traceparent."""
    assert parse_traceparent(value) == expected


@given(st.binary(max_size=80))
def test_no_bytes_break_the_parsers(value: bytes) -> None:
    """Whatever a stranger sends, the answer is a valid header or nothing."""
    found = parse_traceparent(value)
    assert found is None or (len(found[0]), len(found[1])) == (32, 16)
    assert check_tracestate([value]) in (b"", value) or b"," in value or value.strip(b" \t") != value
    assert check_baggage([value]) in (b"", value)


# ---------------------------------------------------------------------- what is passed on


def test_trace_of_the_caller_is_passed_on_unchanged() -> None:
    """A process without spans names none: what came in goes out."""
    state = (b"tracestate", b"congo=t61rcWkgMzE,rojo=00f067aa0ba902b7")
    assert passed_on([(b"host", b"x"), (b"traceparent", PARENT), state]) == [(b"traceparent", PARENT), state]


def test_call_without_a_trace_begins_one_for_all_that_its_handler_does() -> None:
    """Two calls of one handler belong together; two handlers do not."""
    with Trace([], ALL, is_trusted=True):
        first, second = outgoing(ALL), outgoing(ALL)
    with Trace([], ALL, is_trusted=True):
        third = outgoing(ALL)
    assert first == second != third
    assert parse_traceparent(first[0][1]) is not None


def test_call_outside_of_any_handler_begins_its_own_trace() -> None:
    """A script's calls are traces each."""
    first, second = outgoing(ALL), outgoing(ALL)
    assert first != second
    assert [name for name, _ in first] == [b"traceparent"]
    assert parse_traceparent(first[0][1]) is not None


@pytest.mark.parametrize("bad", [b"x" * 2048, PARENT + b"-x", PARENT.upper(), b"00-" + b"0" * 32 + b"-" + SPAN + b"-01"])
def test_malformed_traceparent_begins_a_new_trace_without_the_old_state(bad: bytes) -> None:
    """Nothing of an invalid context is believed, its tracestate neither."""
    found = passed_on([(b"traceparent", bad), (b"tracestate", b"a=b")])
    assert [name for name, _ in found] == [b"traceparent"]
    assert TRACE not in found[0][1].lower()
    assert parse_traceparent(found[0][1]) is not None


def test_two_traceparents_begin_a_new_trace() -> None:
    """Of two, none is to be believed."""
    found = passed_on([(b"traceparent", PARENT), (b"traceparent", PARENT)])
    assert TRACE not in found[0][1]


def test_context_ends_with_the_handler() -> None:
    """After the handler nothing of its trace is left, and its end may be told twice."""
    trace = Trace([(b"traceparent", PARENT)], ALL, is_trusted=True)
    with trace:
        assert current_trace.get() is trace
        trace.end(200)
    assert current_trace.get() is None


def test_threads_of_one_handler_see_one_trace() -> None:
    """Who reads first makes no difference."""
    trace = Trace([], ALL, is_trusted=True)
    seen: list[bytes] = []
    threads = [threading.Thread(target=lambda: seen.append(trace.found.headers[0][1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1


# ---------------------------------------------------------------------- abuse


def test_sampled_flag_of_a_stranger_does_not_count() -> None:
    """Recording costs money: only a proved identity may ask for it; for others our own share decides."""
    sampled, not_sampled = PARENT, PARENT[:-2] + b"00"
    assert passed_on([(b"traceparent", sampled)], is_trusted=False, sampler=NONE) == [(b"traceparent", not_sampled)]
    assert passed_on([(b"traceparent", not_sampled)], is_trusted=False, sampler=ALL) == [(b"traceparent", sampled)]
    assert passed_on([(b"traceparent", sampled)], is_trusted=True, sampler=NONE) == [(b"traceparent", sampled)]


@pytest.mark.parametrize(
    "state",
    [
        b",".join(b"k%d=v" % n for n in range(33)),
        b"k=v," * 32 + b"k=v",
        b"a=b,a=c",
        b"A=b",
        b"a=",
        b"a=b=c",
        b"a=b\x00",
        b"a=" + b"x" * 257,
        b"a" * 257 + b"=x",
        b",".join(b"k%d=" % n + b"v" * 200 for n in range(30)),
        b"noequals",
        "ä=b".encode(),
    ],
)
def test_tracestate_beyond_the_rules_is_dropped(state: bytes) -> None:
    """33 members, keys twice, wrong characters, too long: dropped as a whole, and the trace goes on."""
    assert passed_on([(b"traceparent", PARENT), (b"tracestate", state)]) == [(b"traceparent", PARENT)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([b"a=b"], b"a=b"),
        ([b"a=b", b"c=d"], b"a=b,c=d"),
        ([b" a=b , ,c=d\t"], b"a=b,c=d"),
        ([b"fw529a3039@dt=FfffffeC3fw2"], b"fw529a3039@dt=FfffffeC3fw2"),
        ([b",".join(b"k%d=v" % n for n in range(32))], b",".join(b"k%d=v" % n for n in range(32))),
        ([], b""),
    ],
)
def test_tracestate_within_the_rules_is_one_header(values: list[bytes], expected: bytes) -> None:
    """Several headers are joined, empty members and blanks vanish."""
    assert check_tracestate(values) == expected


def test_baggage_goes_to_services_and_never_beyond() -> None:
    """From a proved caller to services of the mesh; other hosts don't get it."""
    headers = [(b"traceparent", PARENT), (b"baggage", b"userid=alice,tenant=x")]
    assert passed_on(headers) == headers
    assert passed_on(headers, is_inner=False) == [(b"traceparent", PARENT)]
    assert passed_on(headers, is_trusted=False) == [(b"traceparent", PARENT)]


@pytest.mark.parametrize(
    "baggage",
    [b"a=" + b"x" * LONGEST_BAGGAGE, b",".join(b"k%d=v" % n for n in range(181)), b"a=b\r\nx: y", b"=b", b"a=\x00"],
)
def test_baggage_beyond_the_limits_is_dropped(baggage: bytes) -> None:
    """8192 bytes, 180 members, printable characters."""
    assert passed_on([(b"traceparent", PARENT), (b"baggage", baggage)]) == [(b"traceparent", PARENT)]


def test_share_decides_by_the_id_and_hits_its_mark() -> None:
    """A tenth of new traces is sampled, and every process with the same share decides alike about one of them."""
    tenth = Sampler(0.1)
    flags = [outgoing(tenth)[0][1][-2:] for _ in range(20_000)]
    assert 0.085 < flags.count(b"01") / len(flags) < 0.115
    parent = (b"traceparent", b"00-" + b"f" * 16 + b"0" * 16 + b"-" + SPAN + b"-00")
    assert passed_on([parent], is_trusted=False, sampler=tenth)[0][1][-2:] == b"01"


# ---------------------------------------------------------------------- the observer's face


def test_traceparent_that_the_application_wrote_is_not_contradicted() -> None:
    """Who forwards headers by hand gets no second one, however it is spelt."""
    observer = Observer(service="orders")
    assert observer.client_headers([(b"accept", b"*/*"), (b"Traceparent", PARENT)]) == []
    assert len(observer.client_headers([(b"accept", b"*/*")])) == 1


def test_observer_carries_the_trace_from_the_way_in_to_the_way_out() -> None:
    """The whole of it: server_span around the handler, client_headers under it."""
    observer = Observer(service="orders")
    with observer.server_span("GET", "orders/0", [(b"traceparent", PARENT), (b"baggage", b"a=b")], PEER) as span:
        span.status = 200
        assert observer.client_span("GET", "inventory") is None
        assert observer.client_headers() == [(b"traceparent", PARENT), (b"baggage", b"a=b")]
        assert observer.client_headers(is_egress=True) == [(b"traceparent", PARENT)]
    assert observer.client_headers()[0][1][:35] != PARENT[:35]


def test_nothing_of_opentelemetry_is_imported_without_an_sdk() -> None:
    """A process that configured no tracing does not pay for it."""
    source = """
import sys
from meshlib.observe import Observer
observer = Observer(service="orders")
with observer.server_span("GET", "/", [(b"traceparent", b"x")], None):
    observer.client_span("GET", "orders")
    observer.client_headers()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_forked_processes_do_not_repeat_each_other() -> None:
    """After a fork parent and child draw different ids."""
    source = """
import os
from meshlib.observe.trace import Sampler, outgoing
sampler = Sampler(1.0)
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, outgoing(sampler)[0][1])
    os._exit(0)
child = os.read(read, 100)
os.wait()
print(len(child), child != outgoing(sampler)[0][1])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "55 True\n"
