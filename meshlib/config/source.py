"""Where does a configuration come from, if not from a file?

    MESHLIB_CONFIG=consul://127.0.0.1:8500/shop/mesh.yaml        an installed package, found by the scheme in its entry point

A `ConfigSource` reads the whole document and tells when it should be read again; what the document says is judged like a
file's. What was in force last is kept beside the process (`.meshlib/config`, for this user only), so that it starts while the
source is down; how old that is, is told. One that reads well and can't be put in force (a package that isn't installed, a CA that
isn't there) is never kept. Relative paths in such a document are relative to the folder
in which the process was started.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from meshlib.errors import ConfigError, Problem

from .plugin import opened

log = logging.getLogger("meshlib.config")

GROUP: Final = "meshlib.config"
# No configuration is larger: what is, is something else.
MOST: Final = 16 * 1024 * 1024

_KEPT: Final = Path(".meshlib/config")

# URLs of which it was told that they can't be kept.
_unkept: set[str] = set()


class ConfigSource(Protocol):
    """A document that somebody else keeps. Made by a package's factory, which gets the URL."""

    def read(self) -> bytes:
        """The document as it is now. Raises OSError when it can't be had just now, and ConfigError when it never can."""
        ...

    async def changed(self) -> None:
        """Come back when it should be read again. Raises OSError when that can't be told; it is asked again after a while."""
        ...


Factory = Callable[[str], ConfigSource]


def is_url(source: object) -> bool:
    """Does this name a source, and no file?"""
    return isinstance(source, str) and "://" in source


def shown(url: str) -> str:
    """A URL without what may be a password, for people."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_source(url: str) -> ConfigSource:
    """The source behind a URL. Raises ConfigError."""
    made, _ = opened(
        GROUP,
        url.partition("://")[0],
        lambda factory: factory(url),
        at=shown(url),
        trusted_with="configuration",
    )
    found: ConfigSource = made
    return found


def read_source(source: ConfigSource, url: str) -> tuple[bytes, bool]:
    """The document, and whether it is fresh: if the source can't be asked, the last good one of this user. Raises ConfigError."""
    try:
        content = source.read()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        kept = _kept(url)
        if kept is None:
            hint = "is it up, and is the URL right? No good configuration of it was kept here"
            raise ConfigError([Problem(shown(url), 1, "(source)", f"can't be read: {reason}", hint)]) from None
        content, age = kept
        log.warning(
            "the configuration at %s can't be read (%s): its last good one is used, which is %.0f s old", shown(url), reason, age
        )
        return content, False
    if len(content) > MOST:
        raise ConfigError([Problem(shown(url), 1, "(source)", f"has {len(content)} bytes", f"at most {MOST}")])
    return content, True


def keep(url: str, content: bytes) -> None:
    """Remember a document that is in force. What can't be written is not kept, and that is told once, as it is missed too late."""
    file = _file_of(url)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if file.exists() and file.read_bytes() == content:
            os.utime(file)
            _unkept.discard(url)
            return
        descriptor, name = tempfile.mkstemp(dir=file.parent)  # 0600, and never one that is there already
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            Path(name).replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        if url not in _unkept:
            _unkept.add(url)
            log.warning(
                "the configuration of %s can't be kept in %s: %s. While its source is down, this process will not start",
                shown(url),
                file.parent,
                error.strerror,
            )
    else:
        _unkept.discard(url)


def _kept(url: str) -> tuple[bytes, float] | None:
    """What was kept and its age in seconds, if it is ours and nobody else could have written it."""
    try:
        descriptor = os.open(_file_of(url), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        told = os.fstat(file.fileno())
        if not stat.S_ISREG(told.st_mode) or told.st_uid not in {0, os.geteuid()} or told.st_mode & 0o077 or told.st_size > MOST:
            log.warning("%s is not used: other users may change it, or it isn't ours", _file_of(url))
            return None
        return file.read(), max(0.0, time.time() - told.st_mtime)


def _file_of(url: str) -> Path:
    return _KEPT.absolute() / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.yaml"
