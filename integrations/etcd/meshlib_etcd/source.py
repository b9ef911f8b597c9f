"""How does a configuration that is kept in etcd reach a process?

    etcd://host:port[,host:port…]/meshlib/config/mesh.yaml        etcd+https://…    and, after a question mark, what else is needed

The path is the key, its first slash included. `read` is for whoever starts: it blocks, with a limit, and works in a thread of
its own, as there may be an event loop in this one. `changed` waits on the keeper's loop. A key that was deleted is an error of
`read`; what is done about it, and that the last good configuration stays, is the reader's.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from meshlib.errors import ConfigError, MeshError

from .client import Client
from .messages import Batch, Compacted, shortened
from .settings import Settings, read_settings
from .watch import EVERY, either, watch

SCHEMES: Final = {"etcd": "http", "etcd+https": "https"}
# What may follow the question mark, and the setting that it is.
QUERY: Final = ("user", "user_env", "user_file", "password_env", "password_file", "verify", "cert", "key", "timeout")


class EtcdSource:
    """One key that holds a configuration."""

    def __init__(self, settings: Settings, key: bytes, *, every: float = EVERY) -> None:
        self._settings = settings
        self._key = key
        self._every = every
        self._revision = 0

    def __repr__(self) -> str:
        return f"<EtcdSource {shortened(self._key.decode('utf-8', 'replace'))}>"

    def read(self) -> bytes:
        """The configuration now. Blocks for as long as each member may take. Raises ConfigError or EtcdError, which is an OSError."""
        answers: list[bytes | BaseException] = []

        def work() -> None:
            try:
                answers.append(asyncio.run(self._read()))
            except BaseException as error:
                answers.append(error)

        thread = threading.Thread(target=work, name="meshlib etcd", daemon=True)
        thread.start()
        thread.join()
        (answer,) = answers
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def changed(self) -> None:
        """Comes back when there may be something else to read than the last time. Raises EtcdError when that isn't known any more."""
        client = Client(self._settings)
        is_due = asyncio.Event()

        def told(batch: Batch) -> None:
            # An etcd that is younger than what was read has lost its data, and would be silent until it is as old. And where nothing
            # was read yet, what has happened until now is told by no event.
            if batch.events or (batch.is_created and (not self._revision or batch.revision < self._revision)):
                is_due.set()

        async def wait() -> None:
            await is_due.wait()

        try:
            since = self._revision + 1 if self._revision else 0
            await either(watch(client, self._key, b"", told, since=since, every=self._every), wait())
        except Compacted:
            return
        finally:
            await client.close()

    async def _read(self) -> bytes:
        client = Client(self._settings)
        try:
            page = await client.at(self._key)
        finally:
            await client.close()
        # Of a key that isn't there, too: that it was deleted is known by now.
        self._revision = page.revision
        for entry in page.entries:
            if entry.key == self._key:
                return entry.value
        raise ConfigError(
            f"etcd has nothing at the key {shortened(self._key.decode('utf-8', 'replace'))}.",
            hint="Check the path of the URL: its first slash is part of the key. `etcdctl put KEY < mesh.yaml` writes it.",
        )


def open_config(url: str) -> EtcdSource:
    """The factory behind the entry points `etcd` and `etcd+https`. Raises ConfigError, which doesn't repeat the URL."""
    hint = "etcd://host:port/key, or etcd+https://host:port/key?verify=/path/ca.pem"
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), max_num_fields=16)
    except ValueError:
        raise ConfigError("the URL of the configuration can't be used.", hint=hint) from None
    key = unquote(parts.path)
    if parts.scheme not in SCHEMES or len(key) < 2 or not key.isprintable() or parts.fragment:
        raise ConfigError("the URL of the configuration can't be used.", hint=hint)
    settings: dict[str, Any] = {"urls": [f"{SCHEMES[parts.scheme]}://{host}" for host in parts.netloc.split(",")]}
    for name, value in query:
        setting, _, kind = name.partition("_")
        if name not in QUERY or setting in settings:
            raise ConfigError(f"the URL of the configuration says {shortened(name)!r}.", hint=f"Once each: {', '.join(QUERY)}.")
        settings[setting] = {kind: value} if kind else value
    try:
        return EtcdSource(read_settings(settings), key.encode())
    except MeshError as error:
        text = str(error).replace("registries.etcd.", "its ").replace("registries.etcd:", "its settings:")
        raise ConfigError(f"the URL of the configuration can't be used: {text}") from None
