"""What may a single value look like?

Durations, addresses, names, paths and SPIFFE IDs: each is a type that refuses what it can't mean, with the hint that
belongs to it. Values are parsed here and nowhere later, so that no policy reaches the core that the core would read
otherwise. What depends on other values (does the service exist? do the labels match?) is `vet.py`'s.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Final, NoReturn

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from .defaults import DURATION, TABLE

DEV_TRUST_DOMAIN: Final = "dev.meshlib.invalid"

METHODS: Final = (
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY",
    "COPY", "LOCK", "MKCOL", "MOVE", "PROPFIND", "PROPPATCH", "REPORT", "SEARCH", "UNLOCK",
)  # fmt: skip

_DURATION: Final = re.compile(DURATION + r"\Z")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
HOST: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62}))*\Z")
TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]{1,255}\Z")
_SRV: Final = re.compile(r"_[A-Za-z0-9_-]+\._(?:tcp|udp)\.[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?\Z")
SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+\Z")
# What resolvers read as the number of an address, though it doesn't look like one.
DISGUISED: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?\Z")
_VARIABLE: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}\Z")
_HEADER: Final = re.compile(r"[a-z0-9!#$%&'*+.^`|~-]+\Z")
_COOKIE: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_ESCAPE: Final = re.compile(r"%[0-9A-Fa-f]{2}")


def refuse(message: str, hint: str = "") -> NoReturn:
    """Raise what pydantic collects; message and hint come out unchanged in the Problem."""
    raise PydanticCustomError("mesh", "{message}", {"message": message, "hint": hint})


# ---------------------------------------------------------------- durations


def seconds(value: Any) -> Any:
    """Seconds from a number or from "250ms", "2s", "5m", "1h"."""
    if isinstance(value, bool):
        refuse("must be a duration, not true or false", _DURATION_HINT)
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        match = _DURATION.match(value)
        if match is None:
            refuse(f"{value!r} is not a duration", _DURATION_HINT)
        return float(value.removesuffix(match[2])) * _UNITS[match[2]]
    refuse("must be a duration", _DURATION_HINT)


_DURATION_HINT: Final = "seconds as a number, or 250ms, 2s, 5m, 1h"


def span(name: str) -> AfterValidator:
    """For a list: each item is in the range of its row in the defaults, and a pair goes from small to large."""
    row = TABLE[name]

    def check(items: tuple[float, ...]) -> tuple[float, ...]:
        for item in items:
            if row.least is not None and row.most is not None and not row.least <= item <= row.most:
                refuse(f"{item:g} is out of range", f"{row.span}; default {list(row.value)}")
        return items

    return AfterValidator(check)


def off_or(name: str, least: float) -> AfterValidator:
    """For a number that is 0 (off) or in a range that doesn't begin there."""
    row = TABLE[name]

    def check(value: float) -> float:
        if 0 < value < least:
            refuse(f"{value:g} is out of range", f"0 (off), or {least:g} to {row.most:g}")
        return value

    return AfterValidator(check)


def _prime(value: int) -> int:
    if not _is_prime(value):
        near_by = next((candidate for candidate in range(value, 5_000_012) if _is_prime(candidate)), 5_000_011)
        refuse(f"{value} is not a prime", f"the next one is {near_by}; 65537 does for 650 endpoints")
    return value


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % divisor for divisor in range(2, math.isqrt(value) + 1))


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        refuse(f"the first value ({pair[0]:g}) is larger than the second ({pair[1]:g})", "[least, most]")
    return pair


# ---------------------------------------------------------------- names and addresses


def is_name(value: str) -> bool:
    """True for what may be the name of a service, or of a store."""
    return NAME.match(value) is not None


def _name(value: str) -> str:
    if not is_name(value):
        refuse(f"{value!r} can't be a name", "small letters, digits and inner hyphens, at most 63: it is a host name, too")
    return value


def split_address(value: str) -> tuple[str, int]:
    """Host and port of a checked address; the host without brackets."""
    host, _, port = value.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(value: str) -> bool:
    """True if nobody outside this machine can be meant."""
    if value.startswith("unix:"):
        return True
    host = split_address(value)[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(value: str, *, can_listen: bool) -> str:
    hint = 'host:port, such as "127.0.0.1:8000" or "[::1]:8000"'
    if "://" in value:
        refuse(f"{value!r} is a URL, not an address", hint)
    host, colon, port = value.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        refuse(f"{value!r} has no port", hint)
    if len(port) > 5 or not (0 if can_listen else 1) <= int(port) <= 65535:
        refuse(f"{value!r} has an impossible port", "0 (any free one) to 65535" if can_listen else "1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        try:
            six = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            refuse(f"{value!r} is not an IPv6 address", hint)
        ip = six.ipv4_mapped or six
        is_any, is_link_local = ip.is_unspecified, ip.is_link_local
    elif re.match(r"[0-9.]+\Z", host):
        try:
            four = ipaddress.IPv4Address(host)
        except ValueError:
            refuse(f"{value!r} is not an IPv4 address", hint)
        is_any, is_link_local = four.is_unspecified, four.is_link_local
    elif not HOST.match(host) or DISGUISED.match(host):
        refuse(f"{value!r} has no valid host", hint + "; IPv6 in brackets")
    else:
        is_any = is_link_local = False
    if is_link_local and not can_listen:
        refuse(f"{value!r} is link-local: clouds hand out credentials there", "the address at which this endpoint is reached")
    if is_any and not can_listen:
        refuse(f"{value!r} is an address to listen on, not one to call", "the address at which this endpoint is reached")
    return value


def _endpoint_address(value: str) -> str:
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        # The kernel's own limit, its final NUL included (unix(7)).
        if not path.startswith("/") or "\0" in path or len(path.encode("utf-8", "surrogateescape")) > 107:
            refuse(f"{value!r} is no UNIX socket", "unix: and an absolute path of at most 107 bytes, as in unix:/run/orders.sock")
        return value
    return _address(value, can_listen=False)


def _dns_address(value: str) -> str:
    return _address(value, can_listen=False)


def _srv_name(value: str) -> str:
    hint = "as in DNS, such as _http._tcp.orders.example"
    labels = value.removesuffix(".").split(".")
    if not _SRV.match(value) or len(value) > 253 or any(len(label) > 63 for label in labels):
        refuse(f"{value!r} is not a name of SRV records", hint)
    return value


def _listen_address(value: str) -> str:
    return _address(value, can_listen=True)


# ---------------------------------------------------------------- identities


def split_spiffe_id(value: str) -> tuple[str, str]:
    """Trust domain and path of a SPIFFE ID, by the letter of the standard (SPIFFE-ID 2.1 to 2.3)."""
    hint = "spiffe://<trust domain>/<path>, such as spiffe://shop.internal/ns/default/sa/orders"
    if len(value.encode("utf-8", "surrogatepass")) > 2048:
        refuse("the SPIFFE ID is longer than 2048 bytes", hint)
    if not value.startswith("spiffe://"):
        refuse(f"{value!r} is not a SPIFFE ID", hint)
    domain, slash, path = value.removeprefix("spiffe://").partition("/")
    if not TRUST_DOMAIN.match(domain):
        refuse(f"{value!r} has no valid trust domain", "small letters, digits, dots, hyphens and underscores")
    if not slash or not all(SEGMENT.match(part) and part not in (".", "..") for part in path.split("/")):
        refuse(f"{value!r} has no valid path", hint + "; no empty, '.' or '..' segments and no slash at the end")
    return domain, "/" + path


def _spiffe_id(value: str) -> str:
    split_spiffe_id(value)
    return value


def _trust_domain(value: str) -> str:
    if not TRUST_DOMAIN.match(value):
        refuse(
            f"{value!r} can't be a trust domain",
            "small letters, digits, dots, hyphens and underscores, such as shop.internal",
        )
    return value


def _namespace(value: str) -> str:
    if not NAME.match(value):
        refuse(
            f"{value!r} can't be a namespace",
            "small letters, digits and inner hyphens: it is part of SPIFFE IDs and DNS names",
        )
    return value


# ---------------------------------------------------------------- paths, methods, headers


def plain_path(value: str, *, is_template: bool = False) -> str:
    """A path in the canonical form in which requests are compared. Other spellings would never match."""
    if not value.startswith("/"):
        refuse(f"{value!r} does not begin with /", "paths are absolute: /orders")
    if _ESCAPE.search(value):
        refuse(f"{value!r} holds an escape", "paths are compared in decoded form: write the character itself")
    if any(ord(char) < 32 or ord(char) == 127 for char in value) or "\\" in value:
        refuse(f"{value!r} holds a character that no canonical path holds", "no backslash and no control characters")
    if "?" in value or "#" in value:
        refuse(f"{value!r} holds a query or fragment", "they are no part of the path; leave them out")
    segments = value.split("/")[1:]
    if any(part in (".", "..") for part in segments) or any(not part for part in segments[:-1]):
        refuse(
            f"{value!r} is not canonical",
            "no empty, '.' or '..' segments: such requests are turned into the canonical form first",
        )
    if not is_template and ("{" in value or "}" in value):
        refuse(f"{value!r} looks like a template", "under `template:`")
    return value


def template(value: str) -> str:
    plain_path(value, is_template=True)
    names: set[str] = set()
    for segment in value.split("/"):
        if "{" not in segment and "}" not in segment:
            continue
        match = _VARIABLE.match(segment)
        if match is None:
            refuse(f"{value!r}: {segment!r} is not a whole variable", "a variable is a whole segment: /items/{id}")
        if match[1] in names:
            refuse(f"{value!r}: the variable {match[1]!r} stands there twice", "give each its own name")
        names.add(match[1])
    return value


def _route_path(value: str) -> str:
    if "*" in value:
        refuse(f"{value!r} holds a *", "`prefix:` matches everything under it, by whole segments")
    return plain_path(value)


def _method(value: str) -> str:
    if value not in METHODS:
        if value.upper() in METHODS:
            refuse(f"{value!r} is not an HTTP method", f"{value.upper()}, in capitals")
        refuse(f"{value!r} is not an HTTP method", f"{near(value, METHODS)}{', '.join(METHODS[:7])} …")
    return value


def header_name(value: str) -> str:
    if value != value.lower():
        refuse(f"{value!r} holds capitals", f"header names are compared in small letters: {value.lower()}")
    if "_" in value:
        refuse(f"{value!r} holds an underscore", "such headers are dropped on their way in: use hyphens")
    if not _HEADER.match(value):
        refuse(f"{value!r} is not a header name", "letters, digits and hyphens, such as x-beta")
    return value


def _cookie_name(value: str) -> str:
    if not _COOKIE.match(value):
        refuse(f"{value!r} is not a cookie's name", "letters, digits and hyphens, such as session")
    return value


def _variable(value: str) -> str:
    if not _WORD.match(value):
        refuse(f"{value!r} is not a variable's name", "id, where the template of a route is /items/{id}")
    return value


def _check_path(value: str) -> str:
    if not value.startswith("/") or value.startswith("//") or any(not 32 < ord(char) < 127 for char in value) or "#" in value:
        refuse(f"{value!r} can't be asked for", "a path as it is sent, such as /healthz")
    return value


def near(word: str, allowed: Iterable[str]) -> str:
    """`did you mean …? ` for a mistyped word, or ""."""
    found = nearest(word, allowed)
    return f"did you mean {found!r}? " if found else ""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The word that was probably meant, or "". Case, hyphen and underscore are no difference."""
    words = {item.lower().replace("_", "-"): item for item in allowed}
    wanted = word.lower().replace("_", "-")
    # Thousands of names for each of thousands of mistakes would take minutes; then the first letter counts.
    candidates = [item for item in words if len(words) <= 500 or item[:1] == wanted[:1]][:500]
    close = difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.6)
    return words[close[0]] if close else ""


def some(names: Iterable[str], most: int = 6) -> str:
    """The first names of a list that may be long."""
    words = list(names)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _label(value: Any) -> Any:
    if not isinstance(value, str):
        is_bare = isinstance(value, int | float) and not isinstance(value, bool)
        refuse("a label's value must be a word", f'put it in quotes: "{value}"' if is_bare else "put it in quotes")
    if not value or len(value) > 253 or any(ord(char) < 32 for char in value):
        refuse("a label's value must be a word of 1 to 253 characters")
    return value


def _title(value: str) -> str:
    if not 1 <= len(value) <= 100 or not value.isprintable():
        refuse("can't be a name", "1 to 100 printable characters: it stands in logs and metrics")
    return value


def _zone(value: str) -> str:
    if not 1 <= len(value) <= 100 or not value.isprintable() or value != value.strip():
        refuse(f"{value!r} can't be a zone", "the word that endpoints have under `zone`, such as eu-west-1a")
    return value


def _guard(value: str) -> str:
    _title(value)
    if "*" in value:
        refuse(f"{value!r} can't be a guard", 'the name as in @mesh.guard("ledger"); what all share stands under retry and admit')
    return value


def word_of(value: Any, words: tuple[str, ...], meanings: dict[str, Any], hint: str) -> Any:
    """A word that is short for a mapping: `peer` for {peer: true}, or what it means."""
    if not isinstance(value, str):
        return value
    if value not in words:
        refuse(f"{value!r} is not allowed", f"{near(value, words)}{hint}")
    return meanings.get(value, {value: True})


def off(value: Any) -> Any:
    """`off` takes away what the system says."""
    return None if value == "off" else value


Seconds = Annotated[float, BeforeValidator(seconds, json_schema_input_type=float | str)]
Pair = Annotated[tuple[Seconds, Seconds], AfterValidator(_rising)]
Name = Annotated[str, AfterValidator(_name)]
DnsAddress = Annotated[str, AfterValidator(_dns_address)]
SrvName = Annotated[str, AfterValidator(_srv_name)]
EndpointAddress = Annotated[str, AfterValidator(_endpoint_address)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
SpiffeId = Annotated[str, AfterValidator(_spiffe_id)]
TrustDomain = Annotated[str, AfterValidator(_trust_domain)]
Namespace = Annotated[str, AfterValidator(_namespace)]
RoutePath = Annotated[str, AfterValidator(_route_path)]
Template = Annotated[str, AfterValidator(template)]
Title = Annotated[str, AfterValidator(_title)]
Method = Annotated[str, AfterValidator(_method)]
HeaderName = Annotated[str, AfterValidator(header_name)]
Label = Annotated[str, BeforeValidator(_label)]
CookieName = Annotated[str, AfterValidator(_cookie_name)]
Variable = Annotated[str, AfterValidator(_variable)]
CheckPath = Annotated[str, AfterValidator(_check_path)]
Zone = Annotated[str, AfterValidator(_zone)]
GuardName = Annotated[str, AfterValidator(_guard)]
Prime = Annotated[int, AfterValidator(_prime)]
