"""How does a configuration come from Consul's key-value store?

    consul://127.0.0.1:8500/shop/mesh.yaml            consul+https://consul.example:8501/shop/mesh.yaml?verify=/etc/consul/ca.pem

One key is one file. `read` asks for it and blocks for as long as `timeout`: it is called before any loop runs. `changed` waits, by
blocking queries, until the key is another than the one that was read, or gone, and returns; what to do about that, and about
an error, is for the one who reads.

Since there is no configuration yet that could name a token, it is the one that Consul's own tools use (`CONSUL_HTTP_TOKEN` or
`CONSUL_HTTP_TOKEN_FILE`), unless the URL names another variable or file.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from meshlib.errors import ConfigError

from .place import ConsulError, Place, Reader, place_of
from .wire import Agent, Wire

T = TypeVar("T")

SCHEMES: Final = {"consul": "http", "consul+https": "https"}
# As in the watch of a service: an index that never blocks must not make a busy loop.
PACE: Final = 1.0
TEXTS: Final = {"datacenter", "namespace", "partition", "verify", "timeout", "wait"}


class KeyValueConfig:
    """A source of configuration. State of the process: which version of the key was read last."""

    def __init__(self, place: Place, key: str) -> None:
        self.place = place
        self.key = key
        # Of what was read: its ModifyIndex; 0 for a key that is not there, None before anything was read.
        self.version: int | None = None

    def __repr__(self) -> str:
        return f"<KeyValueConfig of {self.key} at {self.place.name}>"

    def read(self) -> bytes:
        """The value now. Raises ConsulError (an OSError) when Consul can't say, and ConfigError when there is no such key."""
        _, self.version, value = apart(self._look)
        if value is None:
            raise ConfigError(
                f"{self.place.name} has no key {self.key}.", hint=f"Put it there: consul kv put {self.key} @mesh.yaml"
            )
        return value

    async def changed(self) -> None:
        """Come back when it should be read again. Raises ConsulError; whoever waits calls again after a while."""
        wire, index, loop, is_first = Wire(self.place), 0, asyncio.get_running_loop(), True
        try:
            while True:
                began = loop.time()
                came, version, _ = await self._look(wire, index)
                if version != self.version:
                    return
                # Not after the first, which is to come back at once. An index of 0 makes each of them one that does.
                if not is_first and loop.time() - began < PACE:
                    await asyncio.sleep(PACE)
                is_first = False
                index = came if came >= max(index, 1) else 0
        finally:
            await wire.close()

    async def _look(self, wire: Wire | None = None, index: int = 0) -> tuple[int, int, bytes | None]:
        """Consul's index, the version of the key, and its value; 0 and None if it isn't there."""
        asked = wire or Wire(self.place)
        try:
            index_now, item = await Agent(asked).kv.get(
                self.key, index=index, dc=self.place.datacenter, consistency="stale" if self.place.is_stale else None
            )
        finally:
            if wire is None:
                await asked.close()
        if item is None:
            return int(index_now), 0, None
        # A key without a value comes as null.
        value, version = item.get("Value") or b"", item.get("ModifyIndex")
        if not isinstance(version, int) or not isinstance(value, bytes):
            raise ConsulError(f"{self.place.name}: the key {self.key} can't be read.", hint="Is that the URL of a Consul agent?")
        return int(index_now), version, value


def open_config(url: str) -> KeyValueConfig:
    """The factory behind the entry point, for URLs that begin with consul:// or consul+https://. Raises ConfigError."""
    hint = "consul://127.0.0.1:8500/path/of/the/key, or consul+https://…?verify=/etc/consul/ca.pem"
    try:
        parts = urlsplit(url)
        asked = dict(parse_qsl(parts.query, keep_blank_values=True))
        is_good = parts.scheme in SCHEMES and parts.hostname and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError("the URL of the configuration can't be used.", hint=hint)  # there might be a secret in it
    if parts.username is not None or parts.password is not None:
        raise ConfigError("the URL of the configuration must not hold a secret.", hint="…?token_env=NAME, or ?token_file=/path")
    key = unquote(parts.path.removeprefix("/"))
    if not key or key.startswith("/") or key.endswith("/") or not key.isprintable():
        raise ConfigError(f"the URL of the configuration names no key: {parts.path!r}.", hint=hint)
    settings: dict[str, Any] = {name: asked.pop(name) for name in sorted(TEXTS & asked.keys())}
    if "stale" in asked:
        settings["stale"] = asked.pop("stale") in {"", "1", "true"}
    settings["token"] = _token(asked)
    if asked:
        raise ConfigError(f"the URL of the configuration: unknown {', '.join(sorted(asked))}.", hint=f"Known: {_known()}.")
    reader = Reader("the URL of the configuration", {**settings, "url": f"{SCHEMES[parts.scheme]}://{parts.netloc}"})
    place = place_of(reader)
    reader.end()
    return KeyValueConfig(place, key)


def _token(asked: dict[str, str]) -> dict[str, str] | None:
    """Which token the URL means: the one that it names, else the one that Consul's own tools use."""
    for kind in ("env", "file"):
        if named := asked.pop(f"token_{kind}", ""):
            return {kind: named}
    if os.environ.get("CONSUL_HTTP_TOKEN"):
        return {"env": "CONSUL_HTTP_TOKEN"}
    file = os.environ.get("CONSUL_HTTP_TOKEN_FILE")
    return {"file": file} if file else None


def _known() -> str:
    return ", ".join(sorted({*TEXTS, "stale", "token_env", "token_file"}))


def apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The outcome of a coroutine, for a caller that blocks and may stand on a running loop: it gets a loop and a thread of its own."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(asyncio.run(work()))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="meshlib-consul", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
