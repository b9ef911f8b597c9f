"""Where are they, by a file that somebody else writes?

The list is the same as under `static`, in YAML or JSON. It is watched by its content, not by its time stamp:
configuration mounts swap a symbolic link, copies keep times, and an editor may write twice within one tick. A file is
written by hand or by a deployment, so it counts as it stands, even when it is empty; what can't be read or understood
changes nothing.

A large file (over 64 KiB) is parsed in a child process and comes back as one short line per endpoint, so that no other
thread of the application waits for the interpreter's lock while a long document is decoded. The first look, at the
start, is done in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshlib.errors import ConfigError, Problem
from meshlib.keeper import apart

from .resolver import EndpointAddress, Snapshot, from_settings

EVERY = 1.0  # seconds; a look costs a read of the page cache
LARGE = 65536
CHILD_LIMIT = 60.0


class FileResolver:
    """The endpoints of one Service, as a file lists them."""

    interval: float | None = EVERY

    def __init__(self, service: str, file: Path, *, is_dev: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.service = service
        self.file = file
        self._is_dev = is_dev
        self._clock = clock
        self._seen = b""
        self._snapshot = Snapshot(service, 0, (), clock())

    def look(self) -> Snapshot:
        """Read, and parse in place. Raises ConfigError or OSError."""
        seen, _ = self._read()
        return self._snapshot if self._is_known(seen) else self._took(seen, self._parse())

    async def resolve(self) -> Snapshot:
        seen, size = self._read()
        if self._is_known(seen):
            return self._snapshot
        if size > LARGE and _is_python(sys.executable):
            return self._took(seen, await apart(self._parse_in_a_child, f"meshlib-parse-{self.service}"))
        return self._took(seen, self._parse())

    def _read(self) -> tuple[bytes, int]:
        content = self.file.read_bytes()
        return hashlib.sha256(content).digest(), len(content)

    def _is_known(self, seen: bytes) -> bool:
        if seen != self._seen:
            return False
        self._snapshot = Snapshot(self.service, self._snapshot.version, self._snapshot.endpoints, self._clock())
        return True

    def _took(self, seen: bytes, endpoints: tuple[EndpointAddress, ...]) -> Snapshot:
        # A file that changed again while it was parsed is another content at the next look.
        self._seen = seen
        self._snapshot = Snapshot(self.service, self._snapshot.version + 1, endpoints, self._clock())
        return self._snapshot

    def _parse(self) -> tuple[EndpointAddress, ...]:
        from meshlib.config.load import read_endpoints

        return from_settings(read_endpoints(self.file), is_dev=self._is_dev)

    def _parse_in_a_child(self) -> tuple[EndpointAddress, ...]:
        done = subprocess.run(  # our own interpreter, and the file as an argument
            [sys.executable, "-c", "from meshlib.discover.file import tell; tell()", str(self.file)],
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(part or str(Path.cwd()) for part in sys.path)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHILD_LIMIT,
            check=False,
        )
        lines = done.stdout.splitlines()
        if done.returncode or not lines or lines[-1] != b'"end"':
            reason = done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1] or f"status {done.returncode}"
            problem = Problem(str(self.file), 1, "(file)", f"could not be parsed: {reason}", "the last good list is kept")
            raise ConfigError([problem])
        rows = [json.loads(line) for line in lines[:-1]]
        if rows and "problem" in rows[0]:
            raise ConfigError([Problem(*row["problem"]) for row in rows])
        return tuple(EndpointAddress(*row["endpoint"]) for row in rows)


def tell() -> None:
    """What the child process runs: one line of JSON for each endpoint or problem, and a last line that says that it is
    all.
    """
    from meshlib.config.load import read_endpoints

    rows: list[dict[str, Any]]
    try:
        rows = [
            {"endpoint": [item.address, item.weight, item.zone, item.labels, item.identity or ""]}
            for item in read_endpoints(sys.argv[1])
        ]
    except ConfigError as error:
        rows = [{"problem": [p.file, p.line, p.key, p.message, p.hint]} for p in error.problems]
    sys.stdout.write("".join(json.dumps(row) + "\n" for row in [*rows]) + '"end"\n')


def _is_python(executable: str | None) -> bool:
    """False where Python is embedded: there the executable is the application."""
    return bool(executable) and Path(str(executable)).name.startswith(("python", "pypy"))
