"""Does the agent obey a configuration that is kept in a registry, and no file that happens to lie beside it?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib import cli
from meshlib.agent import report
from meshlib.agent.run import Agent, configured
from meshlib.errors import ConfigError, MeshError
from meshlib.secure import CertificateAuthority
from tests.agent.daemon_world import DOMAIN, ORDERS, STOCK, Paper, mesh_file, place

# The name in its package is that of the function.
LOADER = sys.modules["meshlib.config.load"]
URL = "registry://user:secret@host/shop/mesh.yaml"


class Registry:
    """A source whose text changes when a test says so; None is a registry that is away."""

    def __init__(self, text: str | None) -> None:
        self._text = text
        self._is_changed = asyncio.Event()

    def read(self) -> bytes:
        if self._text is None:
            raise ConnectionRefusedError("nobody is there")
        return self._text.encode()

    async def changed(self) -> None:
        await self._is_changed.wait()
        self._is_changed.clear()
        if self._text is None:
            raise ConnectionRefusedError("nobody is there")

    def write(self, text: str | None) -> None:
        self._text = text
        self._is_changed.set()


def us(*services: str) -> str:
    return f"[{', '.join(f'{{service: {name}, uid: {os.geteuid()}}}' for name in services)}]"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the agent is started: an old mesh.yaml lies there, which gives the identity of stock."""
    with place() as where:
        CertificateAuthority.create(where / "ca", DOMAIN)
        monkeypatch.chdir(where)
        monkeypatch.delenv("MESHLIB_CONFIG", raising=False)
        yield where


def text_of(folder: Path, *services: str, more: str = "") -> str:
    """As it stands in the registry; the file beside the agent says something else."""
    text = mesh_file(folder, f"ca: ca{more}", us(*services)).read_text()
    mesh_file(folder, entries=us("stock"))
    return text


@pytest.fixture
def registry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(text_of(folder, "orders"))
    monkeypatch.setattr(LOADER, "open_source", lambda url: made)
    return made


@contextlib.asynccontextmanager
async def serving(source: str | Path = URL) -> AsyncIterator[Agent]:
    agent = Agent(configured(source), proxy=Paper, grace=1.0)
    agent.check()
    task = asyncio.create_task(agent.run())
    try:
        await until(lambda: len(agent.acceptors) == 2 and bool(agent.issuer.identities))
        yield agent
    finally:
        agent.end()
        await task


async def until(is_so: Callable[[], Any]) -> None:
    async with asyncio.timeout(15):
        while not is_so():
            await asyncio.sleep(0.02)


async def test_the_registry_counts_and_not_a_file_in_the_folder(folder: Path, registry: Registry) -> None:
    """At the start, and when it tells of a change; the password in its URL is told nobody."""
    async with serving() as agent:
        assert list(agent.issuer.identities) == [ORDERS]
        registry.write(text_of(folder, "orders", "stock"))
        await until(lambda: list(agent.issuer.identities) == [ORDERS, STOCK])
        assert (agent.source, agent.reloads) == ("registry://host/shop/mesh.yaml", 1)


async def test_what_can_not_be_used_changes_nothing(
    folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistake is told once, and tried again without a word of the registry's, since it may lack something beside it."""
    monkeypatch.setattr("meshlib.agent.run.RETRY", 0.1)
    async with serving() as agent:
        good = text_of(folder, "orders", "stock")
        registry.write(good.replace("entries", "entires"))
        await until(lambda: agent.reload_failures > 3)
        assert "entires" in agent.fault
        assert sum("can't be used" in line for line in caplog.messages) == 1
        registry._text = good
        await until(lambda: list(agent.issuer.identities) == [ORDERS, STOCK])
        assert not agent.fault


async def test_a_file_that_could_not_be_used_is_tried_again_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it lacked may stand beside it: here, that nobody else may write to it."""
    monkeypatch.setattr("meshlib.agent.run.RETRY", 0.1)
    file = mesh_file(folder, entries=us("orders"))
    async with serving(file) as agent:
        file.chmod(0o664)
        mesh_file(folder, entries=us("orders", "stock")).chmod(0o664)
        await until(lambda: "0664" in agent.fault)
        assert list(agent.issuer.identities) == [ORDERS]
        file.chmod(0o600)
        await until(lambda: list(agent.issuer.identities) == [ORDERS, STOCK])
        assert not agent.fault


async def test_a_registry_that_is_away_takes_nothing_back(
    folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by its silence, nor by the copy beside us, which may be older than what is in force; it is listened to again."""
    monkeypatch.setattr("meshlib.agent.run.RETRY", 0.2)
    async with serving() as agent:
        registry.write(text_of(folder, "stock"))
        await until(lambda: list(agent.issuer.identities) == [STOCK])
        (kept,) = (folder / ".meshlib" / "config").iterdir()
        kept.write_text(text_of(folder, "orders"))
        registry.write(None)
        assert not await agent.reload()
        assert "can't be read now" in agent.fault
        assert list(agent.issuer.identities) == [STOCK]
        registry.write(text_of(folder, "orders", "stock"))
        await until(lambda: list(agent.issuer.identities) == [ORDERS, STOCK])


async def test_the_agent_starts_with_what_was_in_force_last(folder: Path, registry: Registry) -> None:
    """While its registry is away. Without a copy that is no mistake of the configuration: another start may find it."""
    registry.write(None)
    with pytest.raises(MeshError, match="nobody is there|can't be read") as caught:
        configured(URL)
    assert not isinstance(caught.value, ConfigError)
    registry.write(text_of(folder, "orders"))
    async with serving():
        pass
    registry.write(None)
    async with serving() as agent:
        assert list(agent.issuer.identities) == [ORDERS]
        ((_, alarm),) = report.alarms_of(agent)
        assert "may be old" in alarm
        registry.write(text_of(folder, "orders"))
        await until(lambda: not report.alarms_of(agent))


async def test_a_failed_reload_is_tried_again_in_the_middle_of_a_wait(
    folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody sends SIGHUP while the registry is away for a moment, and nothing changes there afterwards."""
    monkeypatch.setattr("meshlib.agent.run.RETRY", 0.2)
    async with serving() as agent:
        text, registry._text = registry._text, None
        assert not await agent.reload(is_asked=True)
        registry._text = text
        await until(lambda: not agent.fault)


@pytest.mark.parametrize("words", [["agent", "run"], ["agent", "status"], ["status"], ["suggest"]])
def test_a_url_on_the_command_line_is_the_one_that_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """As it was written: as a path it would have one slash less."""
    asked: list[str] = []

    def refuse(url: str) -> Any:
        asked.append(url)
        raise ConfigError("there is no such registry.")

    monkeypatch.setattr(LOADER, "open_source", refuse)
    cli.main([*words, "--config", URL])
    assert URL in asked
