"""Does a gRPC call ever fail in a system that never stops turning its certificates over?

The real CA writes new certificates for everybody into the folders from which callers and backends take theirs, again and again, under load:
both kinds of channel call both kinds of server. Nothing is tried again here, so that no failure is hidden. Beside the unary calls there is a
conversation for each pair that is open from the beginning to the end, and short streams that begin all the time; each has to get every
message. Whether certificates were really turned over is seen from both sides: in the handlers, which tell the serial number of their
caller, and by a look at what the ports show.

By default ten seconds, with a turn each half second. `MESHLIB_CHAOS=long` takes sixty, with a turn every two.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.chaos.grpc_served import CHAT, COUNT, WHO
from tests.chaos.grpc_shop import IS_LONG, Load, Shop, backends, connections, percentile
from tests.chaos.inbound_server import until
from tests.support import TRUST_DOMAIN, free_port

SECONDS, EVERY = (60.0, 2.0) if IS_LONG else (10.0, 0.5)

# Each second, of each of the four pairs: calls, and streams of ten messages in a second.
CALLS, STREAMS = 50.0, 2.0
SHORT = [str(number).encode() for number in range(10)]
PAUSE = 0.1

# Files are looked at twice a second; so long after the last turn everybody has the last certificate.
SOON = 1.5

# Services, and what serves them.
SERVERS = {"inventory": "aio", "ledger": "sync"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Seen:
    """Of one pair: the load of unary calls, that of short streams, and the conversation."""

    def __init__(self) -> None:
        self.calls, self.streams = Load(CALLS), Load(STREAMS)
        self.serials: Counter[str] = Counter()
        self.words = 0
        self.faults: list[str] = []

    def stop(self) -> None:
        self.calls.stop()
        self.streams.stop()

    def everything_that_failed(self) -> list[str]:
        return [*self.calls.faults, *self.streams.faults, *self.faults]

    def told(self, words: list[bytes], answers: list[bytes]) -> None:
        self.words = len(answers)
        if answers != [b"re: " + word for word in words]:
            self.faults.append(f"of {len(words)} words of the conversation {len(answers)} were answered")


def plain(serial: str) -> str:
    return serial.lstrip("0")


async def by_aio(mesh: Any, service: str, seen: Seen, is_over: Callable[[], bool]) -> None:
    async with mesh.grpc_channel(service) as channel:
        who, count = channel.unary_unary(WHO), channel.unary_stream(COUNT)

        async def call(number: int) -> None:
            seen.serials[plain((await who(b"")).decode())] += 1

        async def stream(number: int) -> None:
            assert [message async for message in count(b"%d %g" % (len(SHORT), PAUSE))] == SHORT

        async def talk() -> None:
            words: list[bytes] = []
            answers: list[bytes] = []
            try:
                chat = channel.stream_stream(CHAT)()
                while not is_over():
                    words.append(b"%d" % len(words))
                    await chat.write(words[-1])
                    answers.append(await chat.read())
                    await asyncio.sleep(PAUSE)
                await chat.done_writing()
                answers += [answer async for answer in chat]
            except Exception as error:
                seen.faults.append(repr(error))
            seen.told(words, answers)

        await asyncio.gather(seen.calls.drive(call), seen.streams.drive(stream), talk())


def by_threads(mesh: Any, service: str, seen: Seen, is_over: Callable[[], bool]) -> None:
    with mesh.sync_grpc_channel(service) as channel:
        who, count = channel.unary_unary(WHO), channel.unary_stream(COUNT)

        def call(number: int) -> None:
            seen.serials[plain(who(b"").decode())] += 1

        def stream(number: int) -> None:
            assert list(count(b"%d %g" % (len(SHORT), PAUSE))) == SHORT

        def talk() -> None:
            words: list[bytes] = []

            def said() -> Iterator[bytes]:
                while not is_over():
                    words.append(b"%d" % len(words))
                    yield words[-1]
                    time.sleep(PAUSE)

            answers: list[bytes] = []
            try:
                answers += channel.stream_stream(CHAT)(said())
            except Exception as error:
                seen.faults.append(repr(error))
            seen.told(words, answers)

        seen.calls.in_threads(call, 6)
        seen.streams.in_threads(stream, 6)
        talk()
        seen.stop()


def shown_at(port: int, folder: Path, service: str) -> str:
    """The serial number of the certificate that a port shows to a new connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(folder / "me" / "svid.pem", folder / "me" / "key.pem")
    context.load_verify_locations(folder / "me" / "bundle.pem")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plug,
        context.wrap_socket(plug, server_hostname=f"{service}.default.{TRUST_DOMAIN}") as wire,
    ):
        shown = wire.getpeercert(binary_form=True)
        assert shown is not None
        return plain(f"{x509.load_der_x509_certificate(shown).serial_number:x}")


def test_no_call_and_no_stream_fails_while_certificates_turn_over(tmp_path: Path) -> None:
    shop = Shop(tmp_path, *SERVERS)
    ports = [free_port() for _ in SERVERS]
    addresses = {service: [f"127.0.0.1:{port}"] for service, port in zip(SERVERS, ports, strict=True)}
    more: dict[str, Any] = {"retry": {"attempts": 0}, "route": [{"name": "all"}]}
    seen = {(kind, service): Seen() for kind in ("aio", "sync") for service in SERVERS}
    shown: dict[str, set[str]] = {service: set() for service in SERVERS}
    is_over = threading.Event()
    turns = most = 0
    with backends(shop.write(addresses, **more), *SERVERS.items(), ports=ports) as served, shop.mesh(addresses, **more) as mesh:
        threads = []
        for (kind, service), one in seen.items():
            ways = (mesh, service, one, is_over.is_set)
            run = (lambda ways=ways: asyncio.run(by_aio(*ways))) if kind == "aio" else (lambda ways=ways: by_threads(*ways))
            threads.append(threading.Thread(target=run, daemon=True))
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        serials: dict[str, str] = {}
        while time.monotonic() < begun + SECONDS:
            serials = {name: plain(serial) for name, serial in shop.turn_over().items()}
            turns += 1
            most = max(most, connections(ports))
            time.sleep(max(0.0, begun + turns * EVERY - time.monotonic()))
            for service, port in zip(SERVERS, ports, strict=True):
                shown[service].add(shown_at(port, tmp_path / "identities", service))
        time.sleep(SOON)
        last = {service: shown_at(port, tmp_path / "identities", service) for service, port in zip(SERVERS, ports, strict=True)}
        for one in seen.values():
            one.serials["|"] = 0
        counted = {pair: Counter(one.serials) for pair, one in seen.items()}
        time.sleep(0.3)
        newest = {pair: set(Counter(one.serials) - counted[pair]) for pair, one in seen.items()}
        is_over.set()
        for one in seen.values():
            one.stop()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "streams that never end"
        gc.collect()  # a call that is still referred to keeps its connection open
        until(lambda: not connections(ports), 5.0)
        left = connections(ports)
        complaints = [line for backend in served for line in backend.complaints()]
    print(f"\n{turns} turns in {SECONDS:.0f} s; connections: {most} at most, {left} at the end")
    for (kind, service), one in seen.items():
        print(
            f"{kind} to {SERVERS[service]}: {len(one.calls.done)} calls, p50 {percentile(one.calls.done, 0.5):.1f} ms, p99 "
            f"{percentile(one.calls.done, 0.99):.1f} ms; {len(one.streams.done)} streams; {one.words} words; "
            f"{len(one.everything_that_failed())} failed; {len(one.serials) - 1} certificates of ours, {len(shown[service])} of its"
        )
    assert {pair: one.everything_that_failed() for pair, one in seen.items()} == {pair: [] for pair in seen}
    for one in seen.values():
        assert len(one.calls.done) >= 0.5 * CALLS * SECONDS
        assert len(one.streams.done) >= 0.5 * STREAMS * SECONDS
        assert one.words >= 0.3 * SECONDS / PAUSE
        # They were turned over, on both sides, and the last is the one that counts.
        assert len(one.serials) - 1 >= turns / 2
    assert all(len(found) >= turns / 2 for found in shown.values())
    assert newest == {pair: {serials["me"]} for pair in seen}
    assert last == {service: serials[service] for service in SERVERS}
    # Each turn has connections of its own; those of earlier ones are left to the streams that are on them, and end with them.
    assert left == 0 < most <= 4 * max(8, 0.75 * turns)
    assert complaints == []
