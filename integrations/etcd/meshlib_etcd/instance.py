"""What stands at a key of an instance?

    <prefix>services/<service>/<instance id>  =  {"address": "10.0.0.7:8443", "weight": 1.0, "zone": "a", "labels": {…},
                                                  "identity": "spiffe://…", "protocol": "http"}

Anybody with write access puts it there: it is read as strictly as the configuration reads an endpoint. Fields that are not
known here are somebody else's and left alone. What is no address to call over the network is refused, a UNIX socket above all:
what is listening at one of ours is not for a registry to say. The identity that an endpoint must prove is taken from here only
where the configuration says so.
"""

from __future__ import annotations

import ipaddress
import json
import math
from typing import Any, Final
from urllib.parse import quote

from meshlib.discover import EndpointAddress, Instance
from meshlib.errors import ConfigError

LONGEST: Final = 16 * 1024
MOST_LABELS: Final = 64
MOST_WEIGHT: Final = 1e6
_HOST: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_SEGMENT: Final = _HOST | {"."}
_DOMAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


def read_instance(value: bytes, *, has_identities: bool = False) -> EndpointAddress:
    """The endpoint. Raises ValueError with a text that is fit for a log."""
    if len(value) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} bytes")
    try:
        said = json.loads(value.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(said, dict):
        raise ValueError("it is no object")
    weight = said.get("weight", 1.0)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight <= MOST_WEIGHT
        or not math.isfinite(weight)
    ):
        raise ValueError("weight is no number from 0 on")
    zone = said.get("zone", "")
    if not isinstance(zone, str) or len(zone) > 100 or not zone.isprintable():
        raise ValueError("zone is no word")
    identity = said.get("identity", "") or ""
    if not isinstance(identity, str) or (identity and not _is_spiffe_id(identity)):
        raise ValueError("identity is no SPIFFE ID")
    return EndpointAddress(
        _address(said.get("address")), float(weight), zone, _labels(said.get("labels", {})), identity if has_identities else ""
    )


def write_instance(instance: Instance) -> bytes:
    """The value of an instance. Raises ConfigError for one that nobody could read."""
    said: dict[str, Any] = {"address": instance.address, "weight": instance.weight}
    if instance.zone:
        said["zone"] = instance.zone
    if instance.labels:
        said["labels"] = dict(instance.labels)
    if instance.identity:
        said["identity"] = instance.identity
    said["protocol"] = instance.protocol
    try:
        value = json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
        read_instance(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{instance.service} can't be registered in etcd: {error}.", hint="The address is host:port, as others reach it."
        ) from None
    return value


def services_of(prefix: str) -> bytes:
    """Where all services are."""
    return f"{prefix}services/".encode()


def service_key(prefix: str, service: str) -> bytes:
    """What the keys of all instances of a service begin with."""
    return services_of(prefix) + f"{service}/".encode()


def instance_key(prefix: str, service: str, instance: str) -> bytes:
    return service_key(prefix, service) + quote(instance, safe=":@+=,[]").encode()


def name_of(settings: Any, service: str) -> str:
    """The name of a service in etcd: its own, or what `name` says. Raises ConfigError."""
    name = settings.get("name", service)
    if not isinstance(name, str) or not name or len(name) > 253 or "/" in name or not name.isprintable():
        raise ConfigError(f"services.{service}: name must be a text without slashes.")
    return name


def _address(value: Any) -> str:
    """host:port of something that can be called."""
    if not isinstance(value, str) or len(value) > 300:
        raise ValueError("address is no host:port")
    host, colon, port = value.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise ValueError("address has no port")
    if "%" in host:
        raise ValueError("address has a zone of this machine's own")
    is_six = host.startswith("[") and host.endswith("]")
    last = host.rpartition(".")[2]
    try:
        if is_six or (last.isascii() and last.isdigit()):
            six = ipaddress.IPv6Address(host[1:-1]) if is_six else None
            ip = (six.ipv4_mapped or six) if six else ipaddress.IPv4Address(host)
            if ip.is_unspecified or ip.is_link_local or ip.is_multicast:
                raise ValueError("address is none to call")
            return value
    except ipaddress.AddressValueError:
        raise ValueError("address is no host:port") from None
    # What a resolver would read as a number in disguise, such as 0x7f000001.
    if last[:2].lower() == "0x" or not all(
        part and len(part) <= 63 and part[0] != "-" and set(part) <= _HOST for part in host.split(".")
    ):
        raise ValueError("address has no valid host")
    return value


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MOST_LABELS:
        raise ValueError(f"labels are no mapping of at most {MOST_LABELS}")
    for name, label in value.items():
        if not isinstance(label, str) or not 1 <= len(label) <= 253 or not label.isprintable():
            raise ValueError("a label is no word")
        if not 1 <= len(name) <= 253 or not name.isprintable():
            raise ValueError("a label has no name")
    return value


def _is_spiffe_id(value: str) -> bool:
    domain, slash, path = value.removeprefix("spiffe://").partition("/")
    parts = path.split("/")
    is_path = all(part and part not in (".", "..") and set(part) <= _SEGMENT for part in parts)
    is_domain = 0 < len(domain) <= 255 and set(domain) <= _DOMAIN
    return value.startswith("spiffe://") and len(value) <= 2048 and bool(slash) and is_path and is_domain
