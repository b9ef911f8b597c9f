"""Is everything that etcd could say, and everything that a user could write, either understood or refused in words?

What answers here is written by hand: garbage, half answers, other programs. The readers are fed by chance, and the auth and TLS of a real
etcd are in `test_access.py`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshlib_etcd import EtcdError, open_config, open_registry
from meshlib_etcd import client as client_module
from meshlib_etcd.client import lines_of, token_of
from meshlib_etcd.feed import Member
from meshlib_etcd.instance import instance_key, read_instance, write_instance
from meshlib_etcd.messages import Entry, Event, end_of, read_batch, read_error, read_page, read_result
from meshlib_etcd.resolver import Table

import meshlib
from integrations.etcd.tests.cluster import text, until, watching
from meshlib.discover import Instance

HEADER = {"header": {"revision": "7"}}
Answer = Callable[[str, dict[str, Any], asyncio.StreamWriter], Awaitable[bytes | None]]


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """An HTTP server that says what `answer` gives for a path and a question; for None the answer was written already, or never comes."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                question = json.loads(await reader.readexactly(length))
                body = await answer(head.split()[1].decode(), question, writer)
                if body is None:
                    await asyncio.sleep(30)
                    return
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()

    tasks: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await one(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def said(**more: Any) -> bytes:
    return json.dumps({**HEADER, **more}).encode()


def row(key: str, value: str, revision: int = 5) -> dict[str, str]:
    return {"key": text(key), "value": text(value), "mod_revision": str(revision)}


STREAM = b"HTTP/1.1 200 OK\r\n\r\n"
CREATED = json.dumps({"result": {**HEADER, "created": True}}).encode() + b"\n"
GOOD = row("/meshlib/services/orders/a", '{"address":"10.0.0.1:80"}')

# ---------------------------------------------------------------- what answers


BAD_ANSWERS = [
    b"", b"null", b"[]", b"{}", b"{", b'"', b"\xff\xfe", b"<html>", b"[" * 100_000, b"9" * 5000, b"NaN",
    said(kvs={}), said(kvs=[1]), said(kvs=[{}]), said(kvs=[{"key": "!!"}]), said(kvs=[{"key": "YQ"}]), said(kvs=[{"key": 1}]),
    said(kvs=[{"key": "YQ==", "value": "Y\n Q=="}]), said(kvs=[{**GOOD, "mod_revision": -1}]), said(more=1), said(more=True),
    said(kvs=[{**GOOD, "mod_revision": "9" * 30}]), said(kvs=[{**GOOD, "mod_revision": 1.5}]), said(kvs=[{**GOOD, "lease": True}]),
    said(kvs=[row("/elsewhere", "x")]), said(kvs=[GOOD, GOOD]), json.dumps({"header": {}}).encode(), json.dumps({"header": []}).encode(),
    json.dumps({"header": {"revision": None}}).encode(), said(kvs=[row("/meshlib/services/orders0", "x")]),
]  # fmt: skip


async def test_answer_that_is_none_changes_nothing() -> None:
    """What was known before stays; what is told is an error in words, each time."""
    answers = iter([said(), *BAD_ANSWERS])

    async def answer(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        if path == "/v3/watch":
            writer.write(STREAM + CREATED)
            return None
        return said() if "count_only" in question else next(answers, said(kvs=[GOOD]))

    async with serving(answer) as url:
        made = open_registry({"url": url, "timeout": "2s"})
        async with watching(made.resolver("orders", {}), pause=0.0) as (seen,):
            await until(lambda: seen.addresses, [])
            seen.endpoints = {}
            made._feeds[b"/meshlib/services/orders/"]._fail(EtcdError("now"))
            await until(lambda: seen.addresses, ["10.0.0.1:80"])
        assert {type(error) for error in seen.errors} == {EtcdError}
        assert len(seen.errors) == 1 + len(BAD_ANSWERS)
        await made.close()


BAD_LINES = [
    b"{}\n", b"[]\n", b"x\n", b'{"result": []}\n', b'{"result": {}}\n', b'{"error": {"grpc_code": 14, "message": "transport is closing"}}\n',
    b'{"error": "what", "code": "x"}\n', b'{"result": {"header": {"revision": "8"}, "canceled": true, "compact_revision": "9"}}\n',
    b'{"result": {"header": {"revision": "8"}, "canceled": true, "cancel_reason": "etcdserver: permission denied"}}\n',
    b'{"result": {"header": {"revision": "8"}, "events": [{"type": "EXPLODE", "kv": {"key": "YQ==", "mod_revision": "8"}}]}}\n',
    b'{"result": {"header": {"revision": "8"}, "events": [{"kv": {"key": "YQ=="}}]}}\n',
    b'{"result": {"header": {"revision": "8"}, "events": [{"kv": null}]}}\n', b'{"result": {"header": {"revision": "8"}, "events": 5}}\n',
    b"\xff\n", b"[" * 5000 + b"\n",
]  # fmt: skip


@pytest.mark.parametrize("line", [*BAD_LINES, None, b"end"], ids=repr)
async def test_line_that_is_none_ends_the_watch_with_an_error(line: bytes | None, monkeypatch: Any) -> None:
    """Whatever came before it counts. A line without an end (None) is not read for ever, and the end of the answer is no state."""
    monkeypatch.setattr(client_module, "LARGEST_ANSWER", 1 << 16)
    watches = 0

    async def answer(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        nonlocal watches
        if path != "/v3/watch":
            return said(kvs=[GOOD])
        watches += 1
        event = {"kv": row("/meshlib/services/orders/b", '{"address":"10.0.0.2:80"}', 8)}
        writer.write(STREAM + CREATED)
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(b"\n" + json.dumps({"result": {"header": {"revision": "8"}, "events": [event]}}).encode() + b"\n")
        if line == b"end":
            writer.write_eof()
        else:
            writer.write(b"x" * (1 << 18) if line is None else line)
        await writer.drain()
        return None

    async with serving(answer) as url:
        made = open_registry({"url": url, "timeout": "2s"})
        async with watching(made.resolver("orders", {}), pause=30.0) as (seen,):
            await until(lambda: len(seen.errors), 1)
        assert (seen.addresses, watches) == (["10.0.0.1:80", "10.0.0.2:80"], 1)
        assert isinstance(seen.errors[0], EtcdError)
        await made.close()


async def test_watch_that_is_not_begun_is_not_waited_for() -> None:
    """Another program may take the question and say nothing, or something else first."""
    for first in (
        b"",
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        STREAM + b'{"result": {"header": {"revision": "7"}}}\n',
        STREAM,
    ):

        async def answer(path: str, question: dict[str, Any], writer: asyncio.StreamWriter, first: bytes = first) -> bytes | None:
            if path == "/v3/watch":
                writer.write(first)
                return None
            return said()

        async with serving(answer) as url:
            made = open_registry({"url": url, "timeout": "300ms"})
            with pytest.raises(EtcdError):
                await asyncio.wait_for(made.resolver("orders", {}).resolve(), 5)
            await made.close()


async def test_answer_without_an_end_is_not_read_for_ever(monkeypatch: Any) -> None:
    """In bytes, in pages, in bytes of all pages, and in time."""
    monkeypatch.setattr(client_module, "LARGEST_ANSWER", 1 << 16)
    monkeypatch.setattr(client_module, "MOST_ENTRIES", 1000)
    monkeypatch.setattr(client_module, "MOST_BYTES", 1 << 20)
    count = 0

    async def endless(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        nonlocal count
        count += 1
        return said(kvs=[row(f"k{count:09}", "x")], more=True)

    async def bulky(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        nonlocal count
        count += 1
        assert count < 1100, "it is still read"
        return said(kvs=[row(f"k{count:09}", "x" * 32_000)], more=True)

    async def large(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        return b"[" * (1 << 17)

    async def slow(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(100):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.1)
        return None

    for answer, words in (
        (endless, "come to an end: 1001 "),
        (bulky, "come to an end: 33 "),
        (large, "longer than"),
        (slow, "no answer within"),
    ):
        async with serving(answer) as url:
            made = open_registry({"url": url, "timeout": "300ms" if answer is slow else "5s"})
            with pytest.raises(EtcdError, match=words):
                [page async for page in made._client.range(b"k", b"l")]
            await made.close()


async def test_what_was_read_once_is_not_kept() -> None:
    """While a watch runs, the keys and values with which it began are nobody's any more; the same for who joins it later."""
    prefix = b"/meshlib/services/orders/"
    rows = [row(f"{prefix.decode()}{n:02}", json.dumps({"address": f"10.0.0.{n}:80"})) for n in range(100)]

    async def answer(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        if path == "/v3/watch":
            writer.write(STREAM + CREATED)
            return None
        return said() if "count_only" in question else said(kvs=rows)

    def kept() -> int:
        gc.collect()
        return sum(type(each) is Entry and each.key.startswith(prefix) for each in gc.get_objects())  # no lazy object wakes

    async with serving(answer) as url:
        made = open_registry({"url": url})
        async with watching(made.resolver("orders", {})) as (first,):
            await until(lambda: len(first.addresses or ()), 100)
            await until(kept, 0)
            async with watching(made.resolver("orders", {})) as (second,):
                await until(lambda: len(second.addresses or ()), 100)
                await until(kept, 0)
        await made.close()


async def test_page_that_is_too_large_is_asked_for_in_parts(monkeypatch: Any) -> None:
    """Values may be long; one that is too long for itself is an error."""
    monkeypatch.setattr(client_module, "LARGEST_ANSWER", 1 << 16)
    keys = [f"k{n:03}" for n in range(20)]

    async def answer(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        start = base64.b64decode(question["key"]).decode()
        left = [key for key in keys if key >= start]
        return said(kvs=[row(key, "x" * 3000) for key in left[: question["limit"]]], more=len(left) > question["limit"])

    async with serving(answer) as url:
        made = open_registry({"url": url})
        found = [entry.key.decode() async for page in made._client.range(b"k", b"l") for entry in page.entries]
        assert found == keys
        await made.close()


# ---------------------------------------------------------------- readers, by chance

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["1", "YQ==", "DELETE", "PUT"])
)
NAMES = st.sampled_from(
    ["header", "revision", "kvs", "kv", "events", "type", "key", "value", "mod_revision", "lease", "more", "result", "error", "created",
     "canceled", "compact_revision", "cancel_reason", "code", "message", "grpc_code", "token", "address", "weight", "zone", "labels", "identity"]
)  # fmt: skip
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=6)
)
BODIES = st.binary(max_size=200) | TREES.map(lambda tree: json.dumps(tree).encode("utf-8", "surrogatepass"))
LIKELY = st.fixed_dictionaries(
    {"header": st.just({"revision": "5"})},
    optional={"kvs": st.lists(TREES, max_size=3), "events": st.lists(TREES, max_size=3), "more": LEAVES, "created": LEAVES},
)


@settings(max_examples=400, deadline=None)
@given(
    BODIES | LIKELY.map(lambda tree: json.dumps(tree).encode()) | LIKELY.map(lambda tree: json.dumps({"result": tree}).encode())
)
def test_readers_give_what_they_promise_or_refuse(body: bytes) -> None:
    """And raise nothing else, whatever comes."""
    for read in (read_page, read_batch, read_result, token_of):
        with contextlib.suppress(EtcdError):
            read(body)
    assert isinstance(read_error(500, body), EtcdError)
    assert str(read_error(500, body)).isprintable()


INSTANCES = st.fixed_dictionaries(
    {
        "address": st.sampled_from(
            ["10.0.0.1:80", "[::1]:80", "a.b:1", "unix:/x", "x", "0.0.0.0:1", "[fe80::1%eth0]:1", "0x7f.1:80"]
        )
        | st.text(max_size=30)
    },
    optional={"weight": LEAVES, "zone": LEAVES, "labels": TREES, "identity": LEAVES, "protocol": TREES},
)


@settings(max_examples=400, deadline=None)
@given(BODIES | INSTANCES.map(lambda tree: json.dumps(tree).encode()))
def test_values_are_read_or_refused(body: bytes) -> None:
    """What is read can be called over the network: never a socket of this machine, never an address of many."""
    try:
        endpoint = read_instance(body, has_identities=True)
    except ValueError as error:
        assert str(error).isprintable()
    else:
        host, _, port = endpoint.address.rpartition(":")
        assert 0 < int(port) < 65536 and host and endpoint.address.isascii() and 0 <= endpoint.weight <= 1e6
        assert all(isinstance(word, str) for pair in endpoint.labels.items() for word in pair)


@pytest.mark.parametrize(
    "address",
    ["unix:/run/x.sock", "0.0.0.0:80", "[::]:80", "169.254.169.254:80", "[fe80::1]:80", "[::ffff:169.254.169.254]:80", "224.0.0.1:80", "[::1%lo]:80",
     "1.2.3:80", "1:80", "0x7f000001:80", "a.0x1:80", "a..b:80", ".a:80", "-a:80", "a:0", "a:65536", "a:٣", "a", "a:", ":80", "[::1:80", "http://a:80", "a b:80", "a\n:80"],
)  # fmt: skip
def test_address_that_is_none_is_refused(address: str) -> None:
    """Among them those that clouds hand out credentials at, and numbers in disguise."""
    with pytest.raises(ValueError, match="address"):
        read_instance(json.dumps({"address": address}).encode())


@pytest.mark.parametrize(
    "address", ["10.0.0.1:80", "[2001:db8::1]:8443", "orders-1.shop.internal:8443", "localhost:1", "127.0.0.1:65535"]
)
def test_address_that_can_be_called_is_read(address: str) -> None:
    """And what a process writes of itself is read again as it was."""
    written = write_instance(Instance("orders", "x", address, "eu", 2.0, {"v": "1"}, "spiffe://td.x/ns/a/sa/b", "grpc"))
    found = read_instance(written, has_identities=True)
    assert (found.address, found.zone, found.weight, dict(found.labels), found.identity) == (
        address, "eu", 2.0, {"v": "1"}, "spiffe://td.x/ns/a/sa/b",
    )  # fmt: skip
    assert read_instance(written).identity == ""


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2) | st.none(), st.integers(1, 3)), max_size=30),
    st.lists(st.integers(0, 5), max_size=30),
)
def test_table_is_what_all_keys_together_say(steps: list[tuple[int, int | None, int]], pauses: list[int]) -> None:
    """However events are put together: the changes that it tells lead to what a fresh look finds."""
    table = Table("orders", b"p/")
    told: dict[str, float] = {e.address: e.weight for e in asyncio.run(table.begin([]))}
    keys: dict[bytes, Entry] = {}
    waiting: dict[bytes, Event] = {}
    for index, (key_number, address, weight) in enumerate(steps):
        key, revision = b"p/%d" % key_number, index + 1
        value = None if address is None else json.dumps({"address": f"10.0.0.{address + 1}:80", "weight": weight}).encode()
        keys.pop(key, None)
        if value is not None:
            keys[key] = Entry(key, value, revision)
        waiting[key] = Event(key, value, revision)
        if index in pauses or index == len(steps) - 1:
            changed, gone = table.apply(waiting.values())
            waiting.clear()
            for name in gone:
                del told[name]
            for endpoint in changed:
                assert told.get(endpoint.address) != endpoint.weight
                told[endpoint.address] = endpoint.weight
    fresh = asyncio.run(Table("orders", b"p/").begin(keys.values()))
    assert told == {e.address: e.weight for e in fresh}


async def test_event_that_the_range_holds_already_doesnt_count_again() -> None:
    """Who joins a watch that runs may hear of it before and after the range: an older event would take the state back for a moment."""
    member = Member(b"p/")
    member.tell(Event(b"p/a", b"old", 5))
    member.tell(Event(b"p/b", b"new", 8))
    member.begin(7, [Entry(b"p/a", b"now", 7)])
    assert await member.begun() == [Entry(b"p/a", b"now", 7)]
    member.tell(Event(b"p/a", b"older", 6))
    assert await member.next() == [Event(b"p/b", b"new", 8)]


@pytest.mark.parametrize("revision", [7, 3])
async def test_watch_begins_where_the_range_ended(revision: int) -> None:
    """By the same connection, of which a registry that restarts gets one from each process. If etcd is younger by then, it has lost what
    was read, and nobody is told of that."""
    asked: list[tuple[str, Any, int]] = []

    async def answer(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        port = writer.get_extra_info("peername")[1]
        if path == "/v3/watch":
            asked.append(("watch", question["create_request"]["start_revision"], port))
            created = {"header": {"revision": str(revision)}, "created": True}
            writer.write(STREAM + json.dumps({"result": created}).encode() + b"\n")
            return None
        asked.append(("range", question.get("count_only", False), port))
        return said(kvs=[GOOD])

    async with serving(answer) as url:
        made = open_registry({"url": url, "timeout": "1s"})
        async with watching(made.resolver("orders", {}), pause=60.0) as (seen,):
            if revision == 7:
                await until(lambda: seen.addresses, ["10.0.0.1:80"])
            else:
                await until(lambda: bool(seen.errors))
                assert "has lost its data" in str(seen.errors[0])
                assert seen.addresses is None
            assert [each[:2] for each in asked] == [("range", False), ("range", True), ("watch", 8)]
            assert len({port for *_, port in asked}) == 1
        await made.close()


async def test_etcd_that_begins_no_watch_is_down() -> None:
    """Though it answers: otherwise it would be tried as often as one that has just been lost, for ever."""

    async def answer(path: str, question: dict[str, Any], writer: asyncio.StreamWriter) -> bytes | None:
        return b"{}" if path == "/v3/watch" else said(kvs=[GOOD])

    async with serving(answer) as url:
        made = open_registry({"url": url, "timeout": "1s"})
        async with watching(made.resolver("orders", {}), pause=60.0) as (seen,):
            await until(lambda: bool(seen.errors))
            assert seen.said == []
        await made.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=10)), st.lists(st.integers(1, 7), min_size=1))
def test_lines_are_the_same_however_they_come(parts: list[bytes], sizes: list[int]) -> None:
    """The network cuts where it likes."""
    whole = b"\n".join(part.replace(b"\n", b"") for part in parts) + b"\n"

    async def cut() -> AsyncIterator[bytes]:
        at = 0
        while at < len(whole):
            size = sizes[at % len(sizes)]
            yield whole[at : at + size]
            at += size

    async def found() -> list[bytes]:
        return [line async for line in lines_of(cut(), "x")]

    assert asyncio.run(found()) == [line for line in whole.split(b"\n") if line.strip()]


@given(st.binary(min_size=1, max_size=5), st.binary(max_size=5))
def test_range_of_a_prefix_holds_just_what_begins_so(prefix: bytes, rest: bytes) -> None:
    """Bytes of 255 included; zero is etcd's word for no end."""
    end = end_of(prefix)
    assert prefix <= prefix + rest and (end == b"\0" or prefix + rest < end)
    assert end == b"\0" or not end.startswith(prefix)


def test_key_of_an_instance_has_no_more_slashes_than_it_should() -> None:
    """Whatever an id looks like."""
    assert instance_key("/meshlib/", "orders", "a/b c") == b"/meshlib/services/orders/a%2Fb%20c"


# ---------------------------------------------------------------- what a user writes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs url or urls"),
        ({"url": "http://a", "urls": []}, "needs url or urls"),
        ({"urls": []}, "list of 1 to 16"),
        ({"url": "ftp://a"}, "a URL can't be used"),
        ({"url": "http://user:hunter2@a"}, "a URL can't be used"),
        ({"url": "http://a/path"}, "a URL can't be used"),
        ({"url": "http://a:99999"}, "a URL can't be used"),
        ({"url": 5}, "a URL can't be used"),
        ({"url": "http://a", "prefix": "x"}, "ends with a slash"),
        ({"url": "http://a", "timeout": "5"}, "timeout must be a duration"),
        ({"url": "http://a", "timeout": True}, "timeout must be a duration"),
        ({"url": "http://a", "timeout": "1h"}, "timeout must be a duration"),
        ({"url": "http://a", "timeout": float("nan")}, "timeout must be a duration"),
        ({"url": "http://a", "what": 1}, "unknown settings what"),
        ({"url": "http://127.0.0.1", "user": "me"}, "belong together"),
        ({"url": "http://127.0.0.1", "user": "me", "password": "hunter2"}, "must say where it is"),
        ({"url": "http://127.0.0.1", "user": "me", "password": {"env": "X", "file": "Y"}}, "must say where it is"),
        ({"url": "http://etcd.internal", "user": "me", "password": {"env": "X"}}, "unencrypted"),
        ({"url": "http://a", "verify": "/x"}, "certificates are set"),
        ({"url": "https://a", "verify": "/nowhere.pem"}, "certificates can't be used"),
        ({"url": "https://a", "verify": False}, "path of a PEM file"),
        ({"url": "https://a", "key": "/x"}, "a key without cert"),
        ({"url": "http://a", "identities": "yes"}, "true or false"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], words: str) -> None:
    """In words, without what may be secret."""
    with pytest.raises(meshlib.ConfigError, match=words) as told:
        open_registry(settings)
    assert "hunter2" not in str(told.value)


def test_unknown_settings_are_named_for_programs() -> None:
    """So that each is told at its line, with the word that was meant."""
    with pytest.raises(meshlib.ConfigError) as told:
        open_registry({"ulr": "http://a", "pasword": {"env": "X"}})
    assert (told.value.unknown, {"url", "password"} <= set(told.value.known)) == (("pasword", "ulr"), True)
    registry = open_registry({"url": "http://a"})
    with pytest.raises(meshlib.ConfigError) as told:
        registry.register(Instance("orders", "o", "10.0.0.7:8443"), {"tll": "5s"})
    assert (told.value.unknown, told.value.known) == (("tll",), ("name", "ttl"))


@pytest.mark.parametrize(
    "url",
    ["etcd://h", "etcd://h/", "consul://h/k", "etcd://user:hunter2@h/k", "etcd://h/k?what=1", "etcd://h/k?timeout=1s&timeout=2s", "etcd://h/k?user=x",
     "etcd://h/k#f", "etcd:///k", "etcd+https://h/k?verify=/nowhere", "etcd://h/k?password=hunter2&user=x", "etcd://h:x/k", "etcd://h/k?timeout"],
)  # fmt: skip
def test_wrong_url_of_a_configuration_is_told(url: str) -> None:
    """Without repeating it."""
    with pytest.raises(meshlib.ConfigError) as told:
        open_config(url)
    assert "hunter2" not in str(told.value)


def test_url_of_a_configuration_says_all_that_is_needed(monkeypatch: Any) -> None:
    """Several members, a key with its first slash, and where secrets are."""
    monkeypatch.setenv("ETCD_PASSWORD", "p")
    made = open_config("etcd://127.0.0.1:1,[::1]:2/meshlib/mesh%20x.yaml?user=me&password_env=ETCD_PASSWORD&timeout=100ms")
    assert (made._key, made._settings.urls) == (b"/meshlib/mesh x.yaml", ("http://127.0.0.1:1", "http://[::1]:2"))
    assert (made._settings.timeout, made._settings.credentials()) == (0.1, ("me", "p"))
    with pytest.raises(OSError, match="can't be reached"):
        made.read()


def test_secret_is_read_when_it_is_needed(tmp_path: Path, monkeypatch: Any) -> None:
    """A new one counts without a restart; one that is missing is told by its place."""
    file = tmp_path / "password"
    file.write_text("one\n")
    made = open_registry({"url": "http://127.0.0.1:1", "user": {"env": "ETCD_USER"}, "password": {"file": str(file)}})
    monkeypatch.setitem(os.environ, "ETCD_USER", "me")
    assert made._settings.credentials() == ("me", "one")
    file.write_text("two")
    assert made._settings.credentials() == ("me", "two")
    assert "two" not in repr(made) + repr(made._settings)
    file.unlink()
    with pytest.raises(meshlib.ConfigError, match="can't be read: FileNotFoundError"):
        made._settings.credentials()


async def test_refusal_is_told_from_an_etcd_that_is_away() -> None:
    """What lies in the question (no right, too large, unreadable) is one service's affair; what lies in etcd, everybody's."""
    refused = [EtcdError("x", code=code) for code in (3, 5, 7, 9, 16)]
    refused += [read_error(403, b"<html>"), read_error(400, b'{"code": 7, "message": "etcdserver: permission denied"}')]
    away = [EtcdError("x"), *(EtcdError("x", code=code) for code in (1, 2, 4, 8, 13, 14))]
    away += [read_error(503, b""), read_error(429, b""), read_error(408, b""), read_error(500, b'{"code": 14}')]
    assert [each.is_refusal for each in refused + away] == [True] * len(refused) + [False] * len(away)
    with pytest.raises(EtcdError) as caught:
        await Table("orders", b"p/").begin([Entry(b"p/a", b"nonsense", 1)])
    assert caught.value.is_refusal
    member = Member(b"p/")
    member.fail(caught.value)
    with pytest.raises(EtcdError) as caught:
        await member.begun()
    assert caught.value.is_refusal
