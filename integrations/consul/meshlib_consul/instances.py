"""What is an instance in Consul to the mesh?

    Service.Address (else Node.Address), Service.Port     address, IPv6 in brackets
    Meta meshlib-weight, else Weights.Passing             weight; Weights.Warning while a check warns
    Meta meshlib-zone, else Service.Locality.Zone,        zone
      Node.Locality.Zone, Node.Meta meshlib-zone
    tags, then Meta                                       labels: a tag `key=value` is key: value, any other tag: "true"
    Meta meshlib-identity                                 the SPIFFE ID it must prove, if the configuration says `identities: true`

Whoever may register an instance writes all of this, and a registry is no source of authorisation: an identity from there
would let any member of the mesh stand in for the service. So it counts only where the configuration asks for it.

What can't be an address is left out, and told once; when nothing is left of a list that wasn't empty, the answer is wrong as a
whole. Two entries of one address (a process that was killed leaves its entry behind) are one: the newest.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from meshlib.discover import EndpointAddress

from .place import ConsulError

log = logging.getLogger("meshlib.consul")

WEIGHT: Final = "meshlib-weight"
ZONE: Final = "meshlib-zone"
IDENTITY: Final = "meshlib-identity"
PROTOCOL: Final = "meshlib-protocol"
OURS: Final = frozenset({WEIGHT, ZONE, IDENTITY, PROTOCOL})
HEAVIEST: Final = 1000.0
LONGEST_LABEL: Final = 253
_HOST_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")

# What was told already: an entry that nobody corrects would otherwise fill the log with every change.
_told: set[str] = set()


class Rules(NamedTuple):
    is_passing_only: bool = True
    takes_identities: bool = False


def endpoints_of(entries: Iterable[Any], name: str, rules: Rules) -> dict[str, EndpointAddress]:
    """By address, in the order of Consul's answer. Raises ConsulError when none of them can be used."""
    found: dict[str, EndpointAddress] = {}
    newest: dict[str, int] = {}
    count = wrong = 0
    for entry in entries:
        count += 1
        try:
            endpoint, modified = _endpoint(entry, rules)
        except _Unusable as error:
            wrong += 1
            _tell(name, str(error))
            continue
        if endpoint is not None and modified >= newest.get(endpoint.address, -1):
            found[endpoint.address], newest[endpoint.address] = endpoint, modified
    if wrong and wrong == count:
        raise ConsulError(
            f"none of the {count} instances of {name} can be used.", hint="The log says what is wrong with them.", is_refusal=True
        )
    return found


class _Unusable(Exception):
    """One instance, and why."""


def _endpoint(entry: Any, rules: Rules) -> tuple[EndpointAddress | None, int]:
    """What is known of one instance, and its age in Consul's counting. None if it is in no state to be called."""
    node, service = _mapping(entry, "Node"), _mapping(entry, "Service")
    if not service:
        raise _Unusable("an entry without a service")
    who = str(service.get("ID", ""))[:100]
    status = _worst(entry.get("Checks"))
    if status not in ({"passing"} if rules.is_passing_only else {"passing", "warning"}):
        return None, -1
    host = service.get("Address") or node.get("Address")
    address = _address(host, service.get("Port"), who)
    meta = {key: value for key, value in _mapping(service, "Meta").items() if isinstance(key, str) and isinstance(value, str)}
    identity = meta.get(IDENTITY, "") if rules.takes_identities else ""
    if identity and not (identity.startswith("spiffe://") and identity.isascii() and identity.isprintable()):
        raise _Unusable(f"{who}: {IDENTITY} is no SPIFFE ID")
    endpoint = EndpointAddress(
        address, _weight(service, meta, status, who), _zone(node, service, meta), _labels(service, meta), identity
    )
    modified = service.get("ModifyIndex")
    return endpoint, modified if isinstance(modified, int) else 0


def _worst(checks: Any) -> str:
    """What all checks together say; those of the node count, too."""
    said = {check.get("Status") for check in checks if isinstance(check, Mapping)} if isinstance(checks, list) else set()
    return "passing" if said <= {"passing"} else "warning" if said <= {"passing", "warning"} else "critical"


def _address(host: Any, port: Any, who: str) -> str:
    if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise _Unusable(f"{who}: {str(host)[:100]!r} port {str(port)[:20]} is no address")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        if not _is_name(host):
            raise _Unusable(f"{who}: {host[:100]!r} is no host") from None
        return f"{host}:{port}"
    plain = getattr(ip, "ipv4_mapped", None) or ip
    # Nobody is called at "any"; and at link-local addresses, clouds hand out credentials.
    if plain.is_unspecified or plain.is_link_local or plain.is_multicast or "%" in host:
        raise _Unusable(f"{who}: {host[:100]} is no address that can be called")
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"


def _is_name(host: str) -> bool:
    """A host's name, and none that a resolver would read as a number (2130706433, 0x7f.1)."""
    labels = host.removesuffix(".").split(".")
    last = labels[-1].lower()
    is_number = last.isdigit() or last.startswith("0x")
    are_labels = all(0 < len(label) < 64 and not label.startswith("-") for label in labels)
    return len(host) <= 253 and are_labels and not is_number and set(host) <= _HOST_CHARS


def _weight(service: Mapping[str, Any], meta: Mapping[str, str], status: str, who: str) -> float:
    weights = _mapping(service, "Weights")
    said: Any = weights.get("Warning" if status == "warning" else "Passing", 1)
    if WEIGHT in meta and status == "passing":
        said = meta[WEIGHT]
        try:
            said = float(said) if len(said) < 32 else math.nan
        except ValueError:
            said = math.nan
        if not 0 <= said <= HEAVIEST:
            raise _Unusable(f"{who}: {WEIGHT} must be a number of 0 to {HEAVIEST:g}")
    if isinstance(said, bool) or not isinstance(said, int | float) or not said >= 0:
        return 1.0
    return min(float(said), HEAVIEST)


def _zone(node: Mapping[str, Any], service: Mapping[str, Any], meta: Mapping[str, str]) -> str:
    said = (
        meta.get(ZONE),
        _mapping(service, "Locality").get("Zone"),
        _mapping(node, "Locality").get("Zone"),
        _mapping(node, "Meta").get(ZONE),
    )
    return next((zone for zone in said if isinstance(zone, str) and 0 < len(zone) <= 100 and zone.isprintable()), "")


def _labels(service: Mapping[str, Any], meta: Mapping[str, str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    tags = service.get("Tags")
    for tag in tags if isinstance(tags, list) else ():
        if isinstance(tag, str):
            key, mark, value = tag.partition("=")
            labels[key] = value if mark else "true"
    labels.update((key, value) for key, value in meta.items() if key not in OURS)
    return {
        key: value
        for key, value in labels.items()
        if 0 < len(key) <= LONGEST_LABEL and 0 < len(value) <= LONGEST_LABEL and key.isprintable() and value.isprintable()
    }


def _mapping(of: Any, key: str) -> Mapping[str, Any]:
    found = of.get(key) if isinstance(of, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _tell(name: str, what: str) -> None:
    text = f"an instance of {name} in Consul is left out: {what}"
    if text not in _told and len(_told) < 1000:
        _told.add(text)
        log.warning("%s", text if text.isprintable() else repr(text))
