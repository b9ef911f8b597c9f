"""Which ways lead from a peer of another language to the mesh and back, and what happened on each?

A column is one way: a direction, one of the mesh's two kinds of client or server, and how the wire is secured. `plain` is mode observe,
the others are mode enforce: `envoy` has Envoy on the peer's side of the wire, for peers that can't show a certificate; `tls` goes to a
peer's server that shows a certificate of ours and asks for none; `mtls` is mutual TLS with the peer itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.interop.expected import SCENARIOS
from tests.interop.peers import Peer, Secured
from tests.interop.proxies import proxied
from tests.interop.scenarios_aio import AioScenarios
from tests.interop.scenarios_sync import SyncScenarios
from tests.interop.town import DNS_NAME, SERVICE, Town, spiffe_id
from tests.support import free_port, process, wait_until_listening

INWARD, OUTWARD = "their client, our server", "our client, their server"
PATIENCE = 60.0
BUILD_PATIENCE = 1800.0
# Nothing is silent for longer.
TELL_EVERY = 2.0


@dataclass(frozen=True)
class Result:
    peer: str
    direction: str
    way: str  # "aio plain", "sync mtls", …
    scenario: str
    failure: str  # empty if it passed
    seconds: float


@dataclass
class Told:
    """What a whole run has to tell."""

    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @property
    def failures(self) -> int:
        return len(self.broken) + sum(bool(result.failure) for result in self.results)


def try_out(peer: Peer, cache: Path, folder: Path, told: Told) -> None:
    """All ways of one peer."""
    told.versions[peer.name] = peer.version
    if peer.missing:
        told.skipped[peer.name] = peer.missing
        say(f"== {peer.name} {peer.version}: skipped, {peer.missing}")
        return
    say(f"== {peer.name} {peer.version}")
    told.notes[peer.name] = peer.notes
    try:
        peer.build(cache, build)
        with contextlib.ExitStack() as stack:
            town = Town(folder)
            for direction, way, run in itertools.chain(_inward(peer, town, stack), _outward(peer, town, stack)):
                _column(peer, direction, way, run, told)
    except (AssertionError, RuntimeError, OSError) as error:
        told.broken[peer.name] = str(error)
        say(f"   could not be run: {error}")


Way = tuple[str, str, Callable[[str], None]]


def _column(peer: Peer, direction: str, way: str, run: Callable[[str], None], told: Told) -> None:
    begun, failed = time.monotonic(), 0
    said = begun
    for number, scenario in enumerate(SCENARIOS):
        start = time.monotonic()
        if start - said > TELL_EVERY:
            said = start
            say(f"   {direction}, {way}: {number} of {len(SCENARIOS)} done")
        failure = ""
        try:
            run(scenario)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            failed += 1
        told.results.append(Result(peer.name, direction, way, scenario, failure, round(time.monotonic() - start, 3)))
    verdict = f"{failed} FAILED" if failed else "all passed"
    say(f"   {direction}, {way}: {verdict} ({time.monotonic() - begun:.1f} s)")


def _inward(peer: Peer, town: Town, stack: contextlib.ExitStack) -> Iterator[Way]:
    def against(port: int, secured: Secured | None = None) -> Callable[[str], None]:
        def run(scenario: str) -> None:
            command = peer.client(port, scenario, secured)
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
            if done.returncode:
                raise AssertionError(f"exit code {done.returncode}: {_tail(done.stdout + done.stderr)}")

        return run

    kinds = ("aio", "sync")
    for kind in kinds:
        yield INWARD, f"{kind} plain", against(stack.enter_context(town.server(kind, "observe")))
    ports = [stack.enter_context(town.server(kind, "enforce")) for kind in kinds]
    for kind, port in zip(kinds, stack.enter_context(proxied(town, outward=ports)), strict=True):
        yield INWARD, f"{kind} envoy", against(port)
    if peer.speaks_mutual_tls:
        secured = Secured(town.identities / "caller", DNS_NAME, spiffe_id(SERVICE))
        for kind, port in zip(kinds, ports, strict=True):
            yield INWARD, f"{kind} mtls", against(port, secured)


def _outward(peer: Peer, town: Town, stack: contextlib.ExitStack) -> Iterator[Way]:
    def over(mode: str, port: int, wire: str) -> Iterator[Way]:
        mesh = stack.enter_context(town.mesh(mode, f"127.0.0.1:{port}"))

        async def aio(scenario: str) -> None:
            async with mesh.grpc_channel(SERVICE) as channel:
                await AioScenarios(channel, town.protocol).run(scenario)

        def sync(scenario: str) -> None:
            with mesh.sync_grpc_channel(SERVICE) as channel:
                SyncScenarios(channel, town.protocol).run(scenario)

        yield OUTWARD, f"aio {wire}", lambda scenario: asyncio.run(aio(scenario))
        yield OUTWARD, f"sync {wire}", sync

    plain = stack.enter_context(_serving(peer))
    yield from over("observe", plain, "plain")
    yield from over("enforce", stack.enter_context(proxied(town, inward=[plain]))[0], "envoy")
    own = town.identities / SERVICE
    if peer.serves_tls:
        yield from over("enforce", stack.enter_context(_serving(peer, Secured(own, DNS_NAME))), "tls")
    if peer.speaks_mutual_tls:
        secured = Secured(own, DNS_NAME, spiffe_id("caller"))
        yield from over("enforce", stack.enter_context(_serving(peer, secured)), "mtls")


@contextlib.contextmanager
def _serving(peer: Peer, secured: Secured | None = None) -> Iterator[int]:
    port = free_port()
    with process(*peer.server(port, secured)) as child:
        wait_until_listening(port, child, PATIENCE)
        yield port


def build(folder: Path, what: str, command: list[str], more: dict[str, str]) -> None:
    """Run a command that takes its time, and say so while it does."""
    say(f"   building {what} (once; some minutes)")
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **more}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(TELL_EVERY * 5)
                    break
                say(f"   building {what}: {time.monotonic() - begun:.0f} s")
                if time.monotonic() - begun > BUILD_PATIENCE:
                    raise RuntimeError(f"{what} could not be built within {BUILD_PATIENCE:g} s.")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if child.returncode:
            log.seek(0)
            raise RuntimeError(
                f"{what} could not be built, {' '.join(command)} exited with {child.returncode}: {_tail(log.read())}"
            )


def _tail(words: str) -> str:
    """The end of what a program said, where the reason stands."""
    return words.strip()[-2000:]


def say(words: str, **more: Any) -> None:
    print(words, file=sys.stderr, flush=True, **more)
