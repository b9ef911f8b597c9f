"""Is a configuration in Consul's key-value store read whole, and read again when it changes?"""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import entry_points
from typing import Any

import pytest
from meshlib_consul import ConsulError, KeyValueConfig, open_config

import meshlib
from integrations.consul.tests.agents import StandInAgent
from meshlib.errors import ConfigError

PATIENCE = 10.0
KEY = "shop/mesh.yaml"


def config_of(agent: Any, key: str = KEY, query: str = "timeout=1s&wait=2s") -> KeyValueConfig:
    return open_config(f"{agent.url.replace('http://', 'consul://')}/{key}?{query}")


def test_a_key_is_read_as_it_is(agent: Any) -> None:
    """Byte by byte; an empty value is one, and a key that isn't there is none."""
    source = config_of(agent)
    with pytest.raises(ConfigError, match="has no key shop/mesh.yaml"):
        source.read()
    for value in (b"mesh: shop\n", b"\x00\xff\n", b"", b"x" * 400_000):
        agent.set(KEY, value)
        assert source.read() == value


async def test_it_may_be_read_on_a_running_loop(agent: Any) -> None:
    """As by an application that loads its mesh in a coroutine."""
    agent.set(KEY, b"mesh: shop\n")
    assert config_of(agent).read() == b"mesh: shop\n"


async def test_a_change_is_told_once_it_is_there(agent: Any) -> None:
    """Another value, its removal, and its return; and nothing else, however often a query is held in vain."""
    agent.set(KEY, b"one")
    source = config_of(agent, query="timeout=1s&wait=300ms")
    assert await asyncio.to_thread(source.read) == b"one"
    waiting = asyncio.ensure_future(source.changed())
    await asyncio.sleep(0.8)
    agent.set("shop/other.yaml", b"of another key")
    await asyncio.sleep(0.2)
    assert not waiting.done()
    began = time.monotonic()
    await asyncio.to_thread(agent.set, KEY, b"two")
    await asyncio.wait_for(waiting, PATIENCE)
    assert time.monotonic() - began < 2.0
    assert await asyncio.to_thread(source.read) == b"two"
    for change, value in (("DELETE", None), ("PUT", b"three")):
        waiting = asyncio.ensure_future(source.changed())
        await asyncio.sleep(0.1)
        await asyncio.to_thread(agent.call, change, f"/v1/kv/{KEY}", value)
        await asyncio.wait_for(waiting, PATIENCE)
        if value is None:
            with pytest.raises(ConfigError):
                await asyncio.to_thread(source.read)
        else:
            assert await asyncio.to_thread(source.read) == value


async def test_what_changed_between_reading_and_waiting_is_told_at_once(agent: Any) -> None:
    """The wait begins with the version that was read, not with the one that is there."""
    agent.set(KEY, b"one")
    source = config_of(agent)
    await asyncio.to_thread(source.read)
    agent.set(KEY, b"two")
    await asyncio.wait_for(source.changed(), 1.5)


async def test_an_index_that_means_nothing_makes_no_busy_loop(standin: StandInAgent) -> None:
    """With 0 no query waits: it is asked once a second, and what changes then is still told."""
    standin.set(KEY, b"one")
    source = config_of(standin)
    await asyncio.to_thread(source.read)
    resource = next(name for name in standin.standin.touched if KEY in name)
    standin.standin.set_index(resource, 0)
    waiting = asyncio.ensure_future(source.changed())
    before = len(standin.standin.asked("/v1/kv/"))
    await asyncio.sleep(1.5)
    assert 1 < len(standin.standin.asked("/v1/kv/")) - before <= 3
    standin.set(KEY, b"two")
    await asyncio.wait_for(waiting, PATIENCE)


async def test_waiting_leaves_nothing_open(standin: StandInAgent) -> None:
    """Cancelled in the middle of a query."""
    standin.set(KEY, b"one")
    source = config_of(standin)
    await asyncio.to_thread(source.read)
    waiting = asyncio.ensure_future(source.changed())
    await asyncio.sleep(0.2)
    before = len(asyncio.all_tasks())
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(asyncio.all_tasks()) == before - 1


@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "object", "cut"])
async def test_an_agent_that_cannot_say_is_an_oserror(standin: StandInAgent, fault: str) -> None:
    """Never an empty configuration."""
    standin.set(KEY, b"one")
    source = config_of(standin)
    await asyncio.to_thread(source.read)
    standin.standin.fail(fault)
    with pytest.raises(ConsulError) as caught:
        await asyncio.to_thread(source.read)
    assert isinstance(caught.value, OSError)
    with pytest.raises(ConsulError):
        await asyncio.wait_for(source.changed(), PATIENCE)


def test_an_agent_that_hangs_costs_its_time(standin: StandInAgent) -> None:
    """And no more."""
    source = config_of(standin, query="timeout=300ms")
    standin.pause()
    began = time.monotonic()
    try:
        with pytest.raises(ConsulError, match="no answer within"):
            source.read()
        assert time.monotonic() - began < 2.0
    finally:
        standin.resume()


def test_the_token_is_that_of_consul_s_own_tools_or_the_one_that_is_named(
    standin: StandInAgent, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """There is no configuration yet that could say where it is."""
    standin.set(KEY, b"one")
    standin.standin.token = "right"
    (tmp_path / "token").write_text("right\n")
    for name in ("CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConsulError, match="403"):
        config_of(standin).read()
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", str(tmp_path / "token"))
    assert config_of(standin).read() == b"one"
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "wrong")
    with pytest.raises(ConsulError, match="403"):
        config_of(standin).read()
    assert config_of(standin, query=f"token_file={tmp_path}/token").read() == b"one"
    monkeypatch.setenv("OURS", "right")
    assert config_of(standin, query="token_env=OURS").read() == b"one"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "consul://127.0.0.1:8500", "consul://127.0.0.1:8500/", "consul:///x", "consul://u:hunter2@h/x",
        "consul://h:port/x", "consul://h/x?token=hunter2", "consul://h/x?unknown=1", "consul://h/x?timeout=soon", "consul://h/a/",
        "consul+https://h/x?verify=/no/such/file", "consul://h//x",
    ],
)  # fmt: skip
def test_a_wrong_url_is_refused_without_a_secret(url: str) -> None:
    """Whatever stands in it."""
    with pytest.raises(ConfigError) as caught:
        open_config(url)
    assert "hunter2" not in str(caught.value)


def test_it_is_found_by_the_scheme() -> None:
    """Whoever loads a configuration finds it so, with and without TLS."""
    for scheme, url in (("consul", "http://consul.example:8500"), ("consul+https", "https://consul.example:8501")):
        (point,) = entry_points(group="meshlib.config", name=scheme)
        made = point.load()(f"{scheme}://consul.example/shop/mesh.yaml?datacenter=dc2")
        assert (made.place.url, made.key, made.place.datacenter) == (url, KEY, "dc2")


def test_a_mesh_is_loaded_from_it_and_starts_while_it_is_away(agent: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be used last is kept beside the process."""
    monkeypatch.chdir(tmp_path)
    agent.set(KEY, b"mesh: shop\nsecure: {mode: observe}\nservices: {me: {}, orders: {discover: {static: ['127.0.0.1:1']}}}\n")
    url = f"{agent.url.replace('http://', 'consul://')}/{KEY}?timeout=1s"
    for is_there in (True, False):
        if not is_there:
            agent.kill()
        mesh = meshlib.Mesh.load(url, service="me")
        assert sorted(mesh.config.services) == ["me", "orders"]
        mesh.close()
