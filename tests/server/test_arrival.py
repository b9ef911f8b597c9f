"""When is a request worth a thread, and when is a caller too slow? Bytes and numbers, no sockets."""

from __future__ import annotations

import random
import re

import pytest

from meshlib.server import slow
from meshlib.server.door import HEAD
from meshlib.server.slow import AHEAD, LEAST_RATE, PATIENCE_ALL, PATIENCE_BODY, STEADY_RATE, Arrival, Pace, TooLarge, least


def head(*fields: str, line: str = "POST /a HTTP/1.1") -> bytes:
    return "\r\n".join([line, "host: orders", *fields, "", ""]).encode()


def comes_at(whole: bytes) -> int:
    """After how many bytes, one by one, a request is worth a thread; -1 for never."""
    arrival, data = Arrival(), bytearray()
    for index in range(len(whole)):
        data.append(whole[index])
        if arrival.is_worth_a_thread(data):
            return index + 1
    return -1


LONG = b"x" * (AHEAD + 10)


@pytest.mark.parametrize(
    ("request_", "rest"),
    [
        (head(), b""),
        (head(line="GET / HTTP/1.0"), b"anything"),
        (b"\r\n\r\n" + head(), b""),
        (head("content-length: 0"), b"GET /b"),
        (head("content-length: 5") + b"12345", b"GET /b"),
        (head("Content-Length:5") + b"12345", b""),
        (head("CONTENT-LENGTH: \t 5 \t") + b"12345", b""),
        (head(f"content-length: {AHEAD * 2}") + LONG[:AHEAD], LONG),
        (head("transfer-encoding: chunked") + b"0\r\n\r\n", b"GET /b"),
        (head("Transfer-Encoding: chunked") + b"5\r\n12345\r\n00\r\n\r\n", b"GET /b"),
        (head("transfer-encoding: gzip, chunked") + b"5;a=b\r\n1\r\n\r\n\r\nA\r\n0\r\n\r\n90ab\r\n\r\n0;x\r\nA: b\r\n\r\n", b""),
    ],
    ids=[
        "no-body",
        "1.0",
        "empty-lines",
        "0",
        "5",
        "no-space",
        "spaces",
        "long",
        "no-chunks",
        "chunks",
        "extensions",
    ],
)
def test_a_request_is_worth_a_thread_when_it_is_there(request_: bytes, rest: bytes) -> None:
    """Its head, and all of its body or the first 64 KiB; not a byte before, however the bytes come, and whatever is behind it."""
    whole = request_ + rest
    at = comes_at(whole)
    assert at == len(request_)
    assert Arrival().is_worth_a_thread(bytearray(whole))
    chance = random.Random(7)
    for _ in range(20):
        arrival, data, rest_ = Arrival(), bytearray(), whole
        while rest_ and not arrival.is_worth_a_thread(data):
            step = chance.choice((1, 3, 100, 5000))
            data += rest_[:step]
            rest_ = rest_[step:]
        assert len(data) >= at
        assert len(data) < at + 5000


def test_of_long_chunks_as_much_is_waited_for_as_of_any_body() -> None:
    """However long they say that they are."""
    begin = head("transfer-encoding: chunked")
    assert comes_at(begin + b"%x\r\n" % (10 * AHEAD) + LONG) == len(begin) + AHEAD


@pytest.mark.parametrize(
    "request_",
    [
        head("content-length: five"),
        head("content-length: -5"),
        head("content-length: 5", "content-length: 6"),
        head("content-length: 5, 5"),
        head("content-length: 99999999999999999999999"),
        head("transfer-encoding: chunked") + b"hello\r\n",
        head("transfer-encoding: chunked") + b"-5\r\n",
        head("transfer-encoding: chunked") + b"0" * 300,
        head("expect: a miracle", "content-length: 5"),
        b"\x00\x01\r\n\r\n",
    ],
)
def test_what_is_no_request_is_left_to_the_parser(request_: bytes) -> None:
    """It refuses it, with a word; nobody waits for what may never come."""
    assert Arrival().is_worth_a_thread(bytearray(request_))


def test_who_waits_for_a_word_before_the_body_is_known() -> None:
    """`Expect: 100-continue`: nothing more would come, however long it is waited for. HTTP/1.0 knows no such word."""
    for line, expects in (("POST / HTTP/1.1", True), ("POST / HTTP/1.0", False)):
        arrival = Arrival()
        assert not arrival.is_worth_a_thread(bytearray(head("Expect: 100-Continue", "content-length: 5", line=line)))
        assert arrival.expects is expects
    # Nor does a header that mentions it.
    arrival = Arrival()
    arrival.is_worth_a_thread(bytearray(head("x: expect: 100-continue", "content-length: 5")))
    assert not arrival.expects


def test_a_head_without_end_is_refused() -> None:
    """Also one of nothing but empty lines."""
    for filler in (b"x", b"\r\n"):
        with pytest.raises(TooLarge):
            Arrival().is_worth_a_thread(bytearray(filler * (HEAD + 1)))


def test_a_head_is_no_better_for_having_an_end() -> None:
    """All of it may come at once."""
    fits = b"GET / HTTP/1.1\r\nx: "
    assert Arrival().is_worth_a_thread(fits + b"y" * (HEAD - len(fits)) + b"\r\n\r\n")
    with pytest.raises(TooLarge):
        Arrival().is_worth_a_thread(fits + b"y" * (HEAD - len(fits) + 1) + b"\r\n\r\n")


def test_no_regular_expression_sees_a_request() -> None:
    """Some of them take the square of a head's length, which its sender chooses."""
    assert [name for name, value in vars(slow).items() if value is re or isinstance(value, re.Pattern)] == []


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "hostile",
    [
        b"content-length: a" + b" " * 61_000 + b"b",
        b"content-length:" + b" \t" * 30_000 + b"\n",
        b"expect:" + b" " * 61_000 + b"100-continue x",
        b"content-length: " + b"9" * 61_000,
        b"\r\n".join([b"content-length: 1"] * 3_200),
        b"\r\n".join([b":"] * 20_000),
    ],
    ids=["spaces", "tabs", "expects", "digits", "lengths", "lines"],
)
def test_a_hostile_head_is_read_in_a_moment(hostile: bytes) -> None:
    """60 KB of what takes a careless parser longest: there is nothing in it to wait for. It freezes nobody."""
    for _ in range(20):
        arrival = Arrival()
        assert arrival.is_worth_a_thread(b"POST / HTTP/1.1\r\nhost: x\r\n" + hostile + b"\r\n\r\n")
        assert not arrival.expects


def test_each_byte_is_looked_at_once() -> None:
    """A head that comes byte by byte costs what it is long, and not the square of that."""

    class Counting(bytearray):
        seen = 0

        def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
            Counting.seen += len(self) - start
            return super().find(sub, start)

    arrival, data = Arrival(), Counting()
    for byte in head(*(f"x-{index}: y" for index in range(200))):
        data.append(byte)
        arrival.is_worth_a_thread(data)
    assert Counting.seen < 5 * len(data)


def test_the_patience_is_used_up_by_waiting_and_earned_by_speed() -> None:
    """20 seconds of nothing end it; 500 bytes a second don't, and 450 do in the end."""
    silent, steady, slow = Pace(), Pace(), Pace()
    silent.waited(PATIENCE_BODY - 0.1, 0)
    assert not silent.is_over
    silent.waited(0.2, 0)
    assert silent.is_over
    for _ in range(int(PATIENCE_ALL) - 100):
        steady.waited(1.0, int(LEAST_RATE))
    assert steady.left == PATIENCE_BODY
    seconds = 0
    while not slow.is_over:
        slow.waited(1.0, int(LEAST_RATE) - 50)
        seconds += 1
    assert seconds == pytest.approx(PATIENCE_BODY * LEAST_RATE / 50, rel=0.01)


def test_the_least_rate_is_not_enough_for_ever() -> None:
    """One caller holds a thread for five minutes beyond what 10 KB a second take, and no quick beginning makes it more."""
    least_, steady = Pace(), Pace()
    least_.waited(0.1, 10_000_000)
    seconds = 0
    while not least_.is_over:
        least_.waited(1.0, int(LEAST_RATE))
        seconds += 1
    assert seconds == pytest.approx(PATIENCE_ALL / (1 - LEAST_RATE / STEADY_RATE), abs=2)
    for _ in range(100_000):
        steady.waited(1.0, int(STEADY_RATE))
    assert steady.left == PATIENCE_BODY


def test_a_quick_beginning_earns_no_more_than_the_first_patience() -> None:
    """Else 10 MB in a moment would be worth six hours of a thread."""
    pace = Pace()
    pace.waited(0.1, 10_000_000)
    assert pace.left == PATIENCE_BODY
    pace.waited(PATIENCE_BODY, 0)
    assert pace.is_over
    pace.begin()
    assert (pace.left, pace.is_over) == (PATIENCE_BODY, False)


def test_the_shortest_of_some_times() -> None:
    """None is none."""
    assert (least(3.0, None, 2.0), least(None), least(0.0, 1.0)) == (2.0, float("inf"), 0.0)
