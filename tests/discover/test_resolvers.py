"""What do static lists, files and DNS answer, and what do they refuse to answer?"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from meshlib.discover import DnsResolver, EndpointAddress, FileResolver, Immediate, Resolver, Snapshot, StaticResolver
from meshlib.discover import file as file_module
from meshlib.errors import ConfigError

A = EndpointAddress("127.0.0.1:8101")
B = EndpointAddress("127.0.0.1:8102", 2.0, "b", {"version": "v2"}, "spiffe://shop.internal/ns/default/sa/other")

LIST = """\
- "127.0.0.1:8101"
- {address: "127.0.0.1:8102", weight: 2, zone: b, labels: {version: v2},
   identity: "spiffe://shop.internal/ns/default/sa/other"}
"""


# ---------------------------------------------------------------------- snapshots


def test_snapshot_and_endpoints_can_not_be_changed() -> None:
    """What was published stays as it was: frozen, labels too, and apart from the mapping that it was made from."""
    labels = {"version": "v1"}
    endpoint = EndpointAddress("127.0.0.1:1", labels=labels)
    labels["version"] = "v2"
    assert endpoint.labels == {"version": "v1"}
    with pytest.raises(TypeError):
        endpoint.labels["version"] = "v3"  # type: ignore[index]
    with pytest.raises(AttributeError):
        Snapshot("orders", 1, (endpoint,), 0.0).version = 2  # type: ignore[misc]


def test_age_is_counted_from_the_time_it_was_taken() -> None:
    """Two looks that found the same are equal, whatever their age."""
    assert Snapshot("orders", 1, (A,), 100.0).age(103.5) == 3.5
    assert Snapshot("orders", 1, (A,), 100.0) == Snapshot("orders", 1, (A,), 200.0)


def test_resolvers_keep_to_the_protocol(tmp_path: Path) -> None:
    """Static and file answer at once; DNS has to be awaited."""
    static = StaticResolver("orders", (A,), now=0.0)
    file = FileResolver("orders", tmp_path / "e.yaml")
    dns = DnsResolver("orders", "orders.internal:8443")
    assert [isinstance(each, Resolver) for each in (static, file, dns)] == [True, True, True]
    assert [isinstance(each, Immediate) for each in (static, file, dns)] == [True, True, False]
    assert [each.interval for each in (static, file, dns)] == [None, 1.0, 5.0]


# ---------------------------------------------------------------------- file


def test_file_lists_endpoints_as_static_does(tmp_path: Path) -> None:
    """YAML with short and long entries."""
    file = tmp_path / "e.yaml"
    file.write_text(LIST)
    assert FileResolver("orders", file, clock=lambda: 5.0).look() == Snapshot("orders", 1, (A, B), 5.0)


def test_file_may_be_json(tmp_path: Path) -> None:
    """What a program writes is often JSON."""
    file = tmp_path / "e.json"
    file.write_text(json.dumps(["127.0.0.1:8101", {"address": "127.0.0.1:8102", "labels": {"version": "v2"}}]))
    found = FileResolver("orders", file).look().endpoints
    assert found == (A, EndpointAddress("127.0.0.1:8102", labels={"version": "v2"}))


def test_version_rises_with_the_content_and_only_with_it(tmp_path: Path) -> None:
    """Touching a file changes nothing; new content under the old time stamp and size does."""
    file = tmp_path / "e.yaml"
    file.write_text('- "127.0.0.1:8101"\n')
    resolver = FileResolver("orders", file)
    stat = file.stat()
    assert resolver.look().version == 1
    os.utime(file, (1, 1))
    assert resolver.look().version == 1
    file.write_text('- "127.0.0.1:8102"\n')
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (resolver.look().version, resolver.look().endpoints[0].address) == (2, "127.0.0.1:8102")


def test_unchanged_file_counts_as_confirmed(tmp_path: Path) -> None:
    """Each look that finds the same makes the snapshot young again."""
    file = tmp_path / "e.yaml"
    file.write_text(LIST)
    now = 10.0
    resolver = FileResolver("orders", file, clock=lambda: now)
    resolver.look()
    now = 70.0
    assert resolver.look().age(71.0) == 1.0


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("- nonsense\n", 1, "has no port"),
        ('- "127.0.0.1:1"\n- {adress: "127.0.0.1:2"}\n', 2, "unknown key"),
        ('- {address: "127.0.0.1:1", address: "127.0.0.1:2"}\n', 1, ""),
        ("- [\n", 2, "not valid YAML"),
        ("services: {}\n", 1, ""),
    ],
)
def test_wrong_file_is_refused_with_its_line(tmp_path: Path, content: str, line: int, message: str) -> None:
    """An error names the line; nothing of the file is used."""
    file = tmp_path / "e.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        FileResolver("orders", file).look()
    assert line in {problem.line for problem in caught.value.problems}
    assert message in str(caught.value)


def test_file_that_was_wrong_is_looked_at_again(tmp_path: Path) -> None:
    """A mistake is told at every look until it is mended, and the mended file is taken."""
    file = tmp_path / "e.yaml"
    file.write_text("- nonsense\n")
    resolver = FileResolver("orders", file)
    for _ in range(2):
        with pytest.raises(ConfigError):
            resolver.look()
    file.write_text(LIST)
    assert resolver.look().endpoints == (A, B)


def large(count: int) -> str:
    return "".join(f'- {{address: "127.0.0.1:{9000 + n}", labels: {{number: "n{n}"}}}}\n' for n in range(count))


def test_large_file_is_parsed_in_a_child_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 64 KiB the parsing leaves this process; the answer is the same as in place."""
    file = tmp_path / "e.yaml"
    file.write_text(large(1500))
    assert file.stat().st_size > file_module.LARGE
    expected = FileResolver("orders", file).look().endpoints
    resolver = FileResolver("orders", file)
    monkeypatch.setattr(resolver, "_parse", lambda: pytest.fail("parsed in place"))
    assert asyncio.run(resolver.resolve()).endpoints == expected
    assert len(expected) == 1500


def test_large_wrong_file_tells_the_same_problems(tmp_path: Path) -> None:
    """A mistake found in the child process comes back with file, line and hint."""
    file = tmp_path / "e.yaml"
    file.write_text(large(1500) + "- nonsense\n")
    problems = []
    for look in (lambda r: r.look(), lambda r: asyncio.run(r.resolve())):
        with pytest.raises(ConfigError) as caught:
            look(FileResolver("orders", file))
        problems.append(caught.value.problems)
    assert problems[0] == problems[1]
    assert problems[0][0].line == 1501


# ---------------------------------------------------------------------- DNS


def test_every_address_of_a_name_is_an_endpoint() -> None:
    """Each once, in a stable order, IPv6 in brackets."""
    answers = [["10.0.0.2", "fd00::1", "10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.2", "fd00::1"], ["10.0.0.1"]]
    asked: list[tuple[str, int]] = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return answers[len(asked) - 1]

    resolver = DnsResolver("orders", "orders.internal:8443", lookup=lookup)

    async def three() -> list[Snapshot]:
        return [await resolver.resolve() for _ in range(3)]

    found = asyncio.run(three())
    both = ("10.0.0.1:8443", "10.0.0.2:8443", "[fd00::1]:8443")
    assert asked == [("orders.internal", 8443)] * 3
    assert [tuple(e.address for e in each.endpoints) for each in found] == [both, both, ("10.0.0.1:8443",)]
    assert [each.version for each in found] == [1, 1, 2]


@pytest.mark.parametrize("answer", [socket.gaierror(-2, "Name or service not known"), []])
def test_negative_answer_is_an_error_and_not_an_empty_list(answer: list[str] | OSError) -> None:
    """A name that vanished is not a service without endpoints."""

    def lookup(host: str, port: int) -> list[str]:
        if isinstance(answer, OSError):
            raise answer
        return answer

    with pytest.raises(OSError, match=r"not known|no addresses"):
        asyncio.run(DnsResolver("orders", "orders.internal:8443", lookup=lookup).resolve())


def test_lookup_that_hangs_holds_neither_the_loop_nor_a_second_thread() -> None:
    """The look gives up after its limit; the next one waits for the same lookup and takes its answer."""
    answer = threading.Event()
    lookups: list[str] = []

    def lookup(host: str, port: int) -> list[str]:
        lookups.append(threading.current_thread().name)
        assert answer.wait(10)
        return ["10.0.0.1"]

    resolver = DnsResolver("orders", "orders.internal:8443", lookup=lookup, limit=0.01)

    async def looks() -> tuple[EndpointAddress, ...]:
        for _ in range(2):
            with pytest.raises(TimeoutError, match=r"orders\.internal"):
                await resolver.resolve()
        answer.set()
        while True:
            try:
                return (await resolver.resolve()).endpoints
            except TimeoutError:
                continue

    assert asyncio.run(looks()) == (EndpointAddress("10.0.0.1:8443"),)
    assert lookups == ["meshlib-dns-orders"]


def test_system_resolves_localhost() -> None:
    """The real resolver of the system, with what every machine has."""
    found = asyncio.run(DnsResolver("orders", "localhost:8443").resolve()).endpoints
    assert {e.address for e in found} <= {"127.0.0.1:8443", "[::1]:8443"}
    assert found


def test_names_of_srv_records_are_refused_clearly() -> None:
    """They stand under another word, which the error says."""
    with pytest.raises(ConfigError, match=r"SRV records.*srv.*host and port"):
        DnsResolver("orders", "_orders._tcp.internal:1")


@pytest.mark.parametrize("name", ["orders", "orders:", ":80", "orders:http", "orders:0", "orders:70000"])
def test_name_without_a_port_is_refused(name: str) -> None:
    """Addresses of DNS have no port, so the configuration gives one."""
    with pytest.raises(ConfigError, match="is not host:port"):
        DnsResolver("orders", name)


def test_interpreter_ends_although_a_lookup_hangs(tmp_path: Path) -> None:
    """A lookup in progress is no reason to stay: the exit waits for nobody."""
    import subprocess
    import sys

    source = """
import threading, time
from meshlib.discover import DnsResolver
from meshlib.keeper import Keeper
hung = threading.Event()
def lookup(host, port):
    hung.set()
    time.sleep(3600)
resolver = DnsResolver("orders", "orders.internal:1", lookup=lookup)
keeper = Keeper()
keeper.every(1, resolver.resolve, name="look", first=0.0)
keeper.start()
assert hung.wait(10)
"""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - begin < 30
