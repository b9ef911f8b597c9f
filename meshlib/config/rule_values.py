"""What may stand in a single condition of a rule?

Callers, patterns, paths, networks, and the keys of `when`: as in `values.py`, each is a type that refuses what it can't
mean. A pattern that could never match is refused too: in a rule that denies it would be an open door. How a pattern is
compared (its kind) is decided here as well, so that no star reaches the core. Whether a name is known is checked by
`secure_vet.py`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Annotated, Any, Final

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from .values import NAME, SEGMENT, TRUST_DOMAIN, header_name, near, plain_path, refuse, split_spiffe_id, template

# What a condition may ask for; those with [ take a name in brackets.
WHEN_KEYS: Final = (
    "request.headers[", "remote.ip", "source.ip", "source.namespace", "source.principal", "request.auth.principal",
    "request.auth.audiences", "request.auth.presenter", "request.auth.claims[", "destination.port", "connection.sni",
)  # fmt: skip
# Headers that a rule must not ask for, why, and what it asks for instead.
_INSTEAD: Final = {
    "x-forwarded-client-cert": ("an identity comes from the connection, and from no header", "from"),
    "x-forwarded-for": ("who may say that is not known here", "remote_ip_blocks, with secure: {proxies: …}"),
    "x-real-ip": ("who may say that is not known here", "remote_ip_blocks, with secure: {proxies: …}"),
    "host": ("it is compared as it was sent", "hosts: small letters, without port"),
    ":authority": ("it is compared as it was sent", "hosts: small letters, without port"),
    ":method": ("it is no header", "methods"),
    ":path": ("it is no header, and not canonical", "paths"),
}
# Their values are networks, and no patterns.
ADDRESSES: Final = ("source.ip", "remote.ip")
_LONGEST_REGEX: Final = 1024
_HOST_TEXT: Final = re.compile(r"[a-z0-9._:\[\]-]*\Z")
_NETWORK: Final = re.compile(r"[0-9A-Fa-f.:]+(?:/[0-9]{1,3})?\Z")
_CLAIMS: Final = re.compile(r"request\.auth\.claims(?:\[[^\[\]]{1,100}\]){1,8}\Z")
_HEADER_KEY: Final = re.compile(r"request\.headers\[([^\[\]]*)\]\Z")


def fault(check: Callable[[str], Any], value: str) -> tuple[str, str] | None:
    """Message and hint of what a type would say to a value, None if nothing."""
    try:
        check(value)
    except PydanticCustomError as error:
        context = error.context or {}
        return str(context.get("message")), str(context.get("hint"))
    return None


# ---------------------------------------------------------------- callers


def caller(value: str) -> str:
    """`*`, a service's name, a SPIFFE ID, or the beginning of SPIFFE IDs with `*` at the end; `*/…` is for several domains."""
    hint = 'a service, "*", spiffe://<trust domain>/<path>, or one with * at the end'
    if value == "*":
        return value
    if value.startswith("*/"):
        # Which domains are meant stands beside it, under trust_domains: nothing matches a domain that nobody wrote down.
        if not _is_id_path(value[1:]):
            refuse(f"{value!r} has no valid path", "*/ns/<namespace>/sa/<service>, with trust_domains beside it")
        return value
    if value.startswith("spiffe://"):
        start = value.removesuffix("*")
        if "*" in start:
            refuse(f"{value!r}: a * may only stand at the end", hint)
        if start == value:
            split_spiffe_id(value)
            return value
        domain, slash, path = start.removeprefix("spiffe://").partition("/")
        if not slash or not TRUST_DOMAIN.match(domain):
            refuse(
                f"{value!r} would match other trust domains",
                f"end the trust domain with a slash: spiffe://{domain or 'shop.internal'}/*",
            )
        if not _is_id_path(f"/{path}*"):
            refuse(f"{value!r} has no valid path", "it would match nobody: no empty, '.' or '..' segments")
        return value
    if "*" in value or not NAME.match(value):
        refuse(f"{value!r} is no caller", hint)
    return value


def _is_id_path(path: str) -> bool:
    """True for the path of SPIFFE IDs; one that ends with `*` may break off within a segment."""
    *whole, last = path.removesuffix("*").split("/")[1:]
    is_good = all(SEGMENT.match(part) and part not in (".", "..") for part in whole)
    if path.endswith("*"):
        return is_good and (not last or SEGMENT.match(last) is not None)
    return is_good and SEGMENT.match(last) is not None and last not in (".", "..")


# ---------------------------------------------------------------- paths


def _rule_template(value: str) -> str:
    """As a route's, and as Istio writes them: {*} is one segment, too, and {**} one or more."""
    segments = value.split("/")
    if "{**}" in segments and any("{" in part for part in segments[segments.index("{**}") + 1 :]):
        refuse(f"{value!r}: behind {{**}} there may only stand text", "{*} or {name} is one segment, {**} one or more")
    named = [f"{{_{number}}}" if part in ("{*}", "{**}") else part for number, part in enumerate(segments)]
    if "*" in "/".join(named):
        refuse(f"{value!r} mixes a template and a *", _RULE_PATHS)
    template("/".join(named))
    return value


_RULE_PATHS: Final = "/orders, /orders/*, */export, or /orders/{id}"


def _rule_path(value: str) -> str:
    """A path of a rule: exact, with a `*` at one end, or a template."""
    if value == "*":
        refuse("'*' is no path", "/* is every path")
    if "{" in value or "}" in value:
        return _rule_template(value)
    if "*" in (value[1:] if value.startswith("*") else value.removesuffix("*")):
        refuse(f"{value!r}: a * may only stand at one end", _RULE_PATHS)
    if value.startswith("*"):
        plain_path(value[1:] if value[1:2] == "/" else f"/{value[1:]}")
    else:
        plain_path(value.removesuffix("*"))
    return value


def rule_path_kind(value: str) -> tuple[str, str]:
    """How the gate compares a rule's path: its kind and the value without the `*`."""
    if "{" in value:
        return "template", value
    if value.startswith("*"):
        return "suffix", value[1:]
    return ("prefix", value[:-1]) if value.endswith("*") else ("exact", value)


# ---------------------------------------------------------------- patterns


_PATTERN_HINT: Final = '"x" (exactly), "x*" (begins so), "*x" (ends so), or "*" (there, and not empty)'


def pattern(value: str) -> str:
    """A text, exact or with a `*` at one of its ends."""
    if not value:
        refuse("is empty", _PATTERN_HINT)
    if len(value) > 1000 or not value.isprintable():
        refuse("can't be compared", "1 to 1000 printable characters")
    if value != "*" and "*" in (value[1:] if value.startswith("*") else value.removesuffix("*")):
        refuse(f"{value!r}: a * may only stand at one end", _PATTERN_HINT)
    return value


def pattern_kind(value: str) -> tuple[str, str]:
    """How a pattern is compared: exact, prefix, suffix or any; and the text without its star."""
    if value == "*":
        return "any", ""
    if value.endswith("*"):
        return "prefix", value[:-1]
    return ("suffix", value[1:]) if value.startswith("*") else ("exact", value)


def namespace_pattern(value: str) -> str:
    """The same for a namespace: one segment of a SPIFFE ID."""
    text = pattern_kind(pattern(value))[1]
    if text and not SEGMENT.match(text):
        refuse(f"{value!r} could be no namespace", "the one segment behind /ns/ in the SPIFFE IDs of callers")
    return value


def token_principal(value: str) -> str:
    """The same for who a token speaks of: <iss>/<sub>."""
    kind, text = pattern_kind(pattern(value))
    if kind == "exact" and "/" not in text.rstrip("/"):
        refuse(f"{value!r} could be nobody", "issuer and subject: https://id.shop.example/alice, or with a * at one end")
    return value


def host_pattern(value: str) -> str:
    """The same for a host, in the form in which hosts are compared: small letters, no port, no dot at the end."""
    pattern(value)
    text = pattern_kind(value)[1]
    if text != text.lower():
        refuse(f"{value!r} holds capitals", f"hosts are compared in small letters: {value.lower()}")
    if re.search(r"(?:[a-z0-9]|\]):[0-9]*\Z", text) and not is_ip(text):
        refuse(f"{value!r} holds a port", "ports are cut off before hosts are compared; `ports` asks for ours")
    if text.endswith(".") and not value.endswith("*"):
        refuse(f"{value!r} ends with a dot", "it is cut off before hosts are compared; leave it out")
    if not _HOST_TEXT.match(text):
        refuse(f"{value!r} is no host", "letters, digits, dots and hyphens, such as api.shop.example")
    return value


def regex(value: str) -> str:
    """An expression for whole paths. What people are used to and a linear engine can't do is told here; the core judges the rest."""
    if not 1 <= len(value) <= _LONGEST_REGEX or not value.isprintable():
        refuse("can't be an expression", f"1 to {_LONGEST_REGEX} printable characters")
    for word in ("(?=", "(?!", "(?<=", "(?<!", "(?P=", "(?>"):
        if word in value:
            refuse(f"{value!r}: {word}…) is not supported", _LINEAR)
    if re.search(r"(?<!\\)(?:\\\\)*\\[1-9]", value):
        refuse(f"{value!r}: references back are not supported", _LINEAR)
    return value


_LINEAR: Final = "nobody may make a rule slow: no looking around and no references back; say it with several rules"


# ---------------------------------------------------------------- networks


def network(value: str) -> str:
    """An address or network in its canonical spelling."""
    hint = 'an address or a network, such as "10.0.0.0/8", "192.0.2.7" or "::1"'
    if not _NETWORK.match(value):
        refuse(f"{value!r} is no address or network", hint)
    try:
        found = ipaddress.ip_network(value, strict=False)
    except ValueError:
        refuse(f"{value!r} is no address or network", hint)
    if ipaddress.ip_address(value.split("/", 1)[0]) != found.network_address:
        refuse(f"{value!r} is an address within a network", f"{found}, or the address alone")
    if isinstance(found, ipaddress.IPv6Network) and found.prefixlen >= 96 and found.network_address.ipv4_mapped is not None:
        inner = ipaddress.ip_network(f"{found.network_address.ipv4_mapped}/{found.prefixlen - 96}")
        refuse(f"{value!r} would match nothing: such addresses are compared as what they are", str(inner))
    return str(found) if "/" in value else str(found.network_address)


def proxy_network(value: str) -> str:
    """A network whose word is believed. All there are would be everyone's."""
    found = network(value)
    if found.endswith("/0"):
        refuse(f"{value!r} is everyone", "the networks of your own proxies, as small as they are")
    return found


def is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


# ---------------------------------------------------------------- when


def when_key(value: str) -> str:
    """What a condition asks for."""
    header = _HEADER_KEY.match(value)
    if header is not None and header[1] in ("traceparent", "tracestate"):
        refuse(f"{value!r}: a trace is never policy", "whoever calls writes it: ask a claim of a token, or the peer")
    if "baggage" in value or (header is not None and header[1].startswith("uberctx-")):
        hint = "baggage is written by whoever calls, at any hop: ask a claim of a token, or the peer"
        refuse(f"{value!r}: baggage is never policy", hint)
    if header is not None:
        if header[1] in _INSTEAD:
            refuse(f"{value!r}: {_INSTEAD[header[1]][0]}", _INSTEAD[header[1]][1])
        header_name(header[1])
        return value
    if value in WHEN_KEYS or _CLAIMS.match(value):
        return value
    root = value.split("[", 1)[0]
    allowed = [key.rstrip("[") for key in WHEN_KEYS]
    if root == "request.headers":
        refuse(f"{value!r} names no header", "request.headers[x-role]")
    if root == "request.auth.claims":
        refuse(f"{value!r} names no claim", "request.auth.claims[groups], or request.auth.claims[realm][roles]")
    if root in allowed:
        refuse(f"{value!r}: {root} has no parts", root)
    keys = ", ".join(f"{key}…]" if key.endswith("[") else key for key in WHEN_KEYS)
    refuse(f"{value!r} is nothing that a rule can ask for", f"{near(root, allowed)}one of {keys}")


def claims_of(key: str) -> tuple[str, ...]:
    """The names in the brackets of a key."""
    return tuple(re.findall(r"\[([^\[\]]*)\]", key))


def principal_pattern(value: str) -> str:
    """A pattern for SPIFFE IDs that stays within one trust domain."""
    pattern(value)
    kind, text = pattern_kind(value)
    hint = "spiffe://<trust domain>/<path>, or one with * at the end"
    if kind == "any":
        return value
    if kind == "suffix":
        refuse(f"{value!r} would match every trust domain", "under `from`, with trust_domains beside it")
    if not text.startswith("spiffe://"):
        refuse(f"{value!r} is not a SPIFFE ID", hint)
    if kind == "exact":
        split_spiffe_id(value)
        return value
    domain, slash, _ = text.removeprefix("spiffe://").partition("/")
    if not slash or not TRUST_DOMAIN.match(domain):
        refuse(f"{value!r} would match other trust domains", f"spiffe://{domain or 'shop.internal'}/*")
    return value


def _port(value: int) -> int:
    if not 1 <= value <= 65535:
        refuse(f"{value} is no port", "1 to 65535")
    return value


def port_text(value: str) -> str:
    """A port as a pattern: digits."""
    if not re.match(r"[1-9][0-9]{0,4}\Z", value) or int(value) > 65535:
        refuse(f"{value!r} is no port", 'a number in quotes, such as "8443"')
    return value


Caller = Annotated[str, AfterValidator(caller)]
RulePath = Annotated[str, AfterValidator(_rule_path)]
Pattern = Annotated[str, AfterValidator(pattern)]
NamespacePattern = Annotated[str, AfterValidator(namespace_pattern)]
TokenPrincipal = Annotated[str, AfterValidator(token_principal)]
HostPattern = Annotated[str, AfterValidator(host_pattern)]
Network = Annotated[str, AfterValidator(network)]
ProxyNetwork = Annotated[str, AfterValidator(proxy_network)]
PathRegex = Annotated[str, AfterValidator(regex)]
WhenKey = Annotated[str, AfterValidator(when_key)]
Port = Annotated[int, AfterValidator(_port)]
