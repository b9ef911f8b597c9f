"""Where is the agent, and how do we show who we are to it?

A `Place` is what `registries.consul`, the URL of a configuration and `secure.identity` have in common: the agent's URL, the
token, datacenter, namespace and partition, the CA of its TLS, and how long to wait. It is read here once, by one reader that
refuses what it doesn't know: a setting that is silently ignored is worse than an error.

The token is never written in a configuration: it is named, by a variable or a file, and read again for each request, so that
one that was exchanged on disk counts at once. It opens no connection.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from meshlib.errors import ConfigError, MeshError

URL: Final = "http://127.0.0.1:8500"
# Seconds for an answer that needs no waiting. On loopback it comes in milliseconds; a cluster that elects a leader needs some seconds.
TIMEOUT: Final = 5.0
# For how long a blocking query may be held. A server that hangs without a word is noticed after that, and the age of what we know
# is at most this; Consul's own default is 5 minutes, and its most 10.
WAIT: Final = 30.0
LONGEST_WAIT: Final = 600.0
LONGEST_TOKEN: Final = 4096

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


# It asks for patience, and says nothing about a service.
_BUSY: Final = frozenset({408, 429})


class ConsulError(MeshError, ConnectionError):
    """Consul gave no answer that can be used. `status` is that of its HTTP answer, 0 where there was none.

    `is_refusal`: the agent lives, and has answered so for a reason that lies in this question.
    """

    reason = "discover.consul"

    def __init__(self, message: str = "", *, hint: str = "", status: int = 0, is_refusal: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.is_refusal = is_refusal or (400 <= status < 500 and status not in _BUSY)


class Token:
    """What stands for an ACL token: the name of a variable, or a file; "" for none."""

    __slots__ = ("env", "file")

    def __init__(self, env: str = "", file: str = "") -> None:
        self.env = env
        self.file = file

    def __repr__(self) -> str:
        return f"<Token of {self.env or self.file or 'nobody'}>"

    def read(self) -> str:
        """The token now. Raises ConsulError, whose text never holds any of it."""
        if self.env:
            found, where = os.environ.get(self.env, ""), f"the variable {self.env}"
        elif self.file:
            where = f"the file {self.file}"
            try:
                with open(self.file, "rb") as opened:
                    found = opened.read(LONGEST_TOKEN + 1).decode("ascii", "replace")
            except OSError as error:
                raise ConsulError(f"{where} of the token can't be read: {error.strerror}.", hint="Who may read it?") from None
        else:
            return ""
        found = found.strip()
        # It becomes a header: nothing in it may end that, and no library may quote it in an error.
        if not found or len(found) > LONGEST_TOKEN or not all("!" <= char <= "~" for char in found):
            raise ConsulError(f"{where} holds no token.", hint="One line of visible ASCII: the SecretID of an ACL token.")
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """An agent of Consul, as the configuration names it. `socket` is the path of its UNIX socket, "" where it is asked by TCP."""

    url: str = URL
    socket: str = ""
    token: Token = field(default_factory=Token)
    datacenter: str = ""
    namespace: str = ""
    partition: str = ""
    timeout: float = TIMEOUT
    wait: float = WAIT
    is_stale: bool = False
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"Consul at {'unix:' + self.socket if self.socket else self.url}"

    @property
    def is_private(self) -> bool:
        """Whether nobody else hears what is said: TLS, or this machine."""
        if self.socket or self.url.startswith("https://"):
            return True
        host = urlsplit(self.url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


class Reader:
    """Settings, taken out one by one; `end` refuses what nobody took."""

    def __init__(self, where: str, settings: Mapping[str, Any]) -> None:
        self.where = where
        self._settings = dict(settings)
        self._known: list[str] = []

    def text(self, name: str, default: str = "") -> str:
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, str) or not value or not value.isprintable():
            raise self.wrong(name, "must be a text of one line")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def seconds(self, name: str, default: float, least: float, most: float) -> float:
        value = self._take(name)
        if value is None:
            return default
        found = seconds(value)
        if found is None or not least <= found <= most:
            raise self.wrong(name, f"must be a duration of {least:g} to {most:g} s, such as 5s")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._take(name)
        if value is None:
            return ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(
            isinstance(item, str) and item.isprintable() and item for item in items
        ):
            raise self.wrong(name, "must be a text, or a list of texts")
        return tuple(items)

    def pairs(self, name: str) -> dict[str, str]:
        value = self._take(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(each, str) for pair in value.items() for each in pair):
            raise self.wrong(name, "must be a mapping of texts to texts")
        return dict(value)

    def token(self, name: str) -> Token:
        value = self._take(name)
        if value is None:
            return Token()
        if isinstance(value, Mapping) and len(value) == 1:
            ((kind, named),) = value.items()
            if kind in {"env", "file"} and isinstance(named, str) and named:
                return Token(env=named) if kind == "env" else Token(file=named)
        # Whatever stands there may be the secret itself: it isn't quoted.
        raise self.wrong(name, "must say where the token is", "token: {env: CONSUL_TOKEN}, or token: {file: /run/secrets/consul}")

    def end(self) -> None:
        unknown = sorted(map(str, self._settings))
        if unknown:
            known = sorted(self._known)
            raise ConfigError(
                f"{self.where}: unknown settings {', '.join(unknown)}.",
                hint=f"Known: {', '.join(known)}.",
                unknown=unknown,
                known=known,
            )

    def wrong(self, name: str, what: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{self.where}.{name} {what}.", hint=hint)

    def _take(self, name: str) -> Any:
        self._known.append(name)
        return self._settings.pop(name, None)


def seconds(value: Any) -> float | None:
    """Seconds from a number or from 250ms, 2s, 5m, 1h; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        digits = value.rstrip("hms")
        unit = _UNITS.get(value[len(digits) :])
        if unit is not None and digits.replace(".", "", 1).isdigit() and digits.isascii():
            return float(digits) * unit
    return None


def place_of(reader: Reader) -> Place:
    """The agent that settings name. Raises ConfigError."""
    url, socket = _address(reader, reader.text("url", URL))
    verify = reader.text("verify")
    tls = None
    if url.startswith("https://"):
        try:
            tls = ssl.create_default_context(cafile=verify or None)
        except (OSError, ssl.SSLError) as error:
            raise reader.wrong("verify", f"{verify}: no CA certificates can be read from it ({type(error).__name__})") from None
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
    elif verify:
        raise reader.wrong("verify", "needs an https URL", "Without TLS there is nothing to verify.")
    return Place(
        url=url,
        socket=socket,
        token=reader.token("token"),
        datacenter=reader.text("datacenter"),
        namespace=reader.text("namespace"),
        partition=reader.text("partition"),
        timeout=reader.seconds("timeout", TIMEOUT, 0.05, 300.0),
        wait=reader.seconds("wait", WAIT, 0.1, LONGEST_WAIT),
        is_stale=reader.flag("stale", default=False),
        tls=tls,
    )


def _address(reader: Reader, url: str) -> tuple[str, str]:
    """The URL without a path, and the path of a UNIX socket."""
    hint = "http://127.0.0.1:8500, https://consul.example:8501, or unix:///run/consul/http.sock"
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise reader.wrong("url", f"{url!r} is not unix: and an absolute path", hint)
        return "http://localhost", path
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise reader.wrong("url", "can't be read", hint) from None
    if parts.username is not None or parts.password is not None:
        raise reader.wrong("url", "must not hold a secret", "token: {env: CONSUL_TOKEN}")
    if parts.scheme not in {"http", "https"} or not host or parts.path.strip("/") or parts.query or parts.fragment:
        raise reader.wrong("url", f"{url!r} is not the URL of an agent", hint)
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{port or (8500 if parts.scheme == 'http' else 8501)}", ""
