"""What stands in `registries.etcd`, and is it usable?

Secrets are named and never written: a password comes from a variable or a file, and is read each time that it is needed, so that
a new one counts without a restart.
"""

from __future__ import annotations

import ipaddress
import math
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from meshlib.errors import ConfigError

PREFIX: Final = "/meshlib/"
# Seconds for an answer. etcd's own election takes one to two; a node that needs more is given up for the next.
TIMEOUT: Final = 5.0
KNOWN: Final = ("url", "urls", "prefix", "user", "password", "verify", "cert", "key", "timeout", "identities")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True)
class Secret:
    """Where a secret is."""

    env: str = ""
    file: str = ""

    def read(self) -> str:
        """The secret as it is now. Raises ConfigError, which says where it was looked for and never what was found."""
        if self.env:
            found = os.environ.get(self.env, "")
            if not found:
                raise ConfigError(f"the variable {self.env} is not set, and a secret for etcd should be in it.")
            return found
        try:
            return Path(self.file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.file}, with a secret for etcd, can't be read: {type(error).__name__}.") from None


@dataclass(frozen=True, slots=True)
class Settings:
    """A cluster, and how it is spoken with. `urls` are of its members, in the order in which they are tried."""

    urls: tuple[str, ...]
    prefix: str = PREFIX
    user: Secret | str = ""
    password: Secret | None = field(default=None, repr=False)
    verify: str = ""
    cert: str = ""
    key: str = ""
    timeout: float = TIMEOUT
    has_identities: bool = False

    def credentials(self) -> tuple[str, str] | None:
        """Name and password, read now; None where no user is named."""
        if self.password is None:
            return None
        return self.user if isinstance(self.user, str) else self.user.read(), self.password.read()

    def context(self) -> ssl.SSLContext:
        """Who is believed to be etcd, and who we are. Raises ConfigError."""
        try:
            made = ssl.create_default_context(cafile=self.verify or None)
            made.minimum_version = ssl.TLSVersion.TLSv1_2
            self.load_certificate(made)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"registries.etcd: the certificates can't be used: {type(error).__name__}.",
                hint="verify: a PEM file with the CA of etcd; cert and key: PEM files with our certificate and its key.",
            ) from None
        return made

    def load_certificate(self, context: ssl.SSLContext) -> None:
        if self.cert:
            # Without a password: a prompt on the terminal would stop the process.
            context.load_cert_chain(self.cert, self.key or None, password=_no_password)


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def read_settings(settings: Mapping[str, Any]) -> Settings:
    """The settings of `registries.etcd` in mesh.yaml. Raises ConfigError."""
    unknown = sorted(str(name) for name in settings.keys() - set(KNOWN))
    if unknown:
        raise ConfigError(
            f"registries.etcd: unknown settings {', '.join(unknown)}.",
            hint=f"Known: {', '.join(KNOWN)}.",
            unknown=unknown,
            known=KNOWN,
        )
    made = Settings(
        urls=_urls(settings),
        prefix=prefix_of(settings.get("prefix", PREFIX)),
        user=_user(settings.get("user")),
        password=_secret("password", settings.get("password")),
        verify=_path("verify", settings.get("verify")),
        cert=_path("cert", settings.get("cert")),
        key=_path("key", settings.get("key")),
        timeout=seconds("registries.etcd.timeout", settings.get("timeout", TIMEOUT), 0.05, 60.0),
        has_identities=_flag("identities", settings.get("identities", False)),
    )
    return checked(made)


def checked(made: Settings) -> Settings:
    """What must hold of the settings together. Raises ConfigError."""
    if bool(made.user) != (made.password is not None):
        raise ConfigError("registries.etcd: user and password belong together.")
    if made.key and not made.cert:
        raise ConfigError("registries.etcd: a key without cert.")
    plain = [url for url in made.urls if url.startswith("http:")]
    if plain and (made.verify or made.cert):
        raise ConfigError("registries.etcd: certificates are set, and a URL is http.", hint="https://host:port.")
    if made.password is not None and not all(_is_here(url) for url in plain):
        raise ConfigError(
            "registries.etcd: a password would go over the network unencrypted.", hint="https://host:port, or etcd on loopback."
        )
    if len(plain) < len(made.urls):
        made.context()
    return made


def seconds(name: str, value: Any, least: float, most: float) -> float:
    """A duration, as elsewhere in mesh.yaml: a number of seconds, or a number with its unit."""
    found = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    elif isinstance(value, str):
        unit = next((unit for unit in _UNITS if value.endswith(unit) and value.removesuffix(unit)[-1:].isdigit()), "")
        digits = value.removesuffix(unit)
        if unit and digits.isascii() and digits.replace(".", "", 1).isdigit():
            found = float(digits) * _UNITS[unit]
    if not least <= found <= most:
        raise ConfigError(f"{name} must be a duration from {least:g} s to {most:g} s, such as 5s.")
    return found


def prefix_of(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not value.endswith("/") or len(value) > 256:
        raise ConfigError("registries.etcd.prefix must be a text that ends with a slash, such as /meshlib/.")
    return value


def url_of(value: Any) -> str:
    """Scheme, host and port of a member, without anything else."""
    hint = "http://host:port or https://host:port; user and password have settings of their own."
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        port = parts.port
    except ValueError:
        raise ConfigError("registries.etcd: a URL can't be used.", hint=hint) from None
    is_bare = not (parts.username or parts.password or parts.query or parts.fragment or parts.path.strip("/"))
    host = parts.hostname or ""
    if (
        parts.scheme not in ("http", "https")
        or not is_bare
        or not host
        or not host.isascii()
        or not host.isprintable()
        or " " in host
    ):
        # The text itself may hold a password.
        raise ConfigError("registries.etcd: a URL can't be used.", hint=hint)
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port or 2379}"


def _urls(settings: Mapping[str, Any]) -> tuple[str, ...]:
    if ("url" in settings) == ("urls" in settings):
        raise ConfigError("registries.etcd: needs url or urls, and not both.", hint='url: "http://127.0.0.1:2379".')
    given = [settings["url"]] if "url" in settings else settings["urls"]
    if not isinstance(given, list | tuple) or not 1 <= len(given) <= 16:
        raise ConfigError("registries.etcd.urls must be a list of 1 to 16 URLs.")
    return tuple(dict.fromkeys(url_of(each) for each in given))


def _user(value: Any) -> Secret | str:
    if value is None:
        return ""
    if isinstance(value, str) and value and value.isprintable():
        return value
    return _secret("user", value) or ""


def _secret(name: str, value: Any) -> Secret | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and len(value) == 1:
        ((kind, where),) = value.items()
        if kind in ("env", "file") and isinstance(where, str) and where:
            return Secret(**{kind: where})
    raise ConfigError(
        f"registries.etcd.{name} must say where it is, and not what it is.",
        hint=f"{name}: {{env: VARIABLE}} or {name}: {{file: /run/secrets/etcd}}.",
    )


def _path(name: str, value: Any) -> str:
    if value is None or (name == "verify" and value is True):
        return ""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"registries.etcd.{name} must be the path of a PEM file.", hint="There is no way to switch checks off.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"registries.etcd.{name} must be true or false.")
    return value


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
