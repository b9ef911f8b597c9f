"""Which mistakes show only when the parts of a configuration are seen together?

A name that nothing defines, labels that select nobody, two things of one name, an identity that is needed and not
there, an address that development forbids. The checks read the raw values and step over what has the wrong shape
(the types report that), so that one pass finds all mistakes and a first one never hides a second.

Mistakes about trust are found by `secure_vet.py`, those about what comes in by `inbound_vet.py`. What is allowed, but inert
or dangerous, is `warn.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from . import agent_vet, inbound_vet, levels, secure_vet
from .discover_document import Discover
from .document import HashPart, RatePart, Sticky
from .problems import shown
from .section import Choice
from .text import Path, Text, dotted
from .values import DEV_TRUST_DOMAIN, is_loopback, near, some

_WAYS: Final = ("static", "file", "dns", "srv", "registry")


def check(text: Text, *, is_dev: bool) -> None:
    """Note every mistake that concerns more than one value."""
    raw = text.value
    services = _mapping(raw, "services")
    _empty(text, raw)
    _identity(text, raw, services, is_dev=is_dev)
    if is_dev:
        _loopback(text, raw, services)
    for name, service in services.items():
        at: Path = ("services", name)
        if not isinstance(service, dict):
            continue
        _discover(text, at, service)
        _routes(text, at, service)
        _choices(text, at, service)
    if isinstance(raw, dict):
        _choices(text, (), raw)
        for name, guard in _mapping(raw, "guards").items():
            _choices(text, ("guards", name), guard)
        levels.check(text, raw, services)
        secure_vet.check(text, raw, services)
        inbound_vet.check(text, raw, services)
        agent_vet.check(text, raw, services)


def _empty(text: Text, raw: Any) -> None:
    """A key without a value is a line that somebody has not finished; only `metrics: null` says something."""
    known = {problem.key for problem in text.problems}
    for path, value in _walk(raw, ()):
        if value is None and path[-1:] != ("metrics",) and dotted(path) not in known:
            text.refuse(path, "has no value", "write one behind it, or leave the key out")


# ---------------------------------------------------------------- secure


def _identity(text: Text, raw: Any, services: Mapping[str, Any], *, is_dev: bool) -> None:
    secure = _mapping(raw, "secure")
    modes = [_mapping(service, "secure").get("mode") or secure.get("mode") for service in services.values()]
    needing = [name for name, mode in zip(services, modes, strict=True) if mode in ("permissive", "enforce")]
    if needing and "identity" not in secure and not is_dev and isinstance(raw.get("secure"), dict):
        hint = "identity: {folder: ./identities}, filled by `meshlib ca issue`; or another source; or `meshlib dev`; or mode: observe"
        text.refuse(("secure", "identity"), f"is missing, and {some(needing)} can't prove who they are without it", hint)
    for path, value in _walk(raw, ()):
        if value == DEV_TRUST_DOMAIN or (isinstance(value, str) and value.startswith(f"spiffe://{DEV_TRUST_DOMAIN}/")):
            hint = "name a trust domain of your own; `meshlib dev` sets that one by itself"
            text.refuse(path, f"{DEV_TRUST_DOMAIN} belongs to `meshlib dev` and is trusted nowhere else", hint)


def _loopback(text: Text, raw: Any, services: Mapping[str, Any]) -> None:
    """A certificate of `meshlib dev` protects nothing: its CA is a throw-away. So nothing may leave this machine."""
    places: list[tuple[Path, Any]] = [(("observe", "metrics"), _mapping(raw, "observe").get("metrics"))]
    for name, service in services.items():
        if not isinstance(service, dict):
            continue
        at: Path = ("services", name)
        places.append(((*at, "listen"), service.get("listen")))
        places += [((*at, "inbound", *keys), address) for keys, address in inbound_vet.addresses(service)]
        places.append(((*at, "observe", "metrics"), _mapping(service, "observe").get("metrics")))
        places.append(((*at, "discover", "dns"), _mapping(service, "discover").get("dns")))
        for index, (_, address) in enumerate(_endpoints(service)):
            places.append(((*at, "discover", "static", index), address))
    for path, address in places:
        if not isinstance(address, str) or not address.rpartition(":")[2].isdigit() or is_loopback(address):
            continue
        hint = "127.0.0.1, ::1 or localhost; leave MESHLIB_DEV unset where certificates come from a CA of your own"
        text.refuse(path, f"{address!r} is not a loopback address, and MESHLIB_DEV allows no other", hint)


# ---------------------------------------------------------------- discover and route


def _discover(text: Text, at: Path, service: Mapping[str, Any]) -> None:
    if "discover" not in service:
        return
    discover = service["discover"]
    if not isinstance(discover, dict):
        return
    place = (*at, "discover")
    known = list(Discover.model_fields)
    ways = [key for key in _WAYS if key in discover]
    unknown = [key for key in discover if key not in known]
    if "registry" not in discover:
        for key in unknown:
            text.refuse((*place, key), "unknown key", f"{near(key, known)}allowed: {', '.join(known)}")
    # A mistyped way is told as what it is, not a second time as a missing one.
    if len(ways) != 1 and (ways or not unknown):
        text.refuse(place, f"{' and '.join(ways) or 'nothing'} is given", f"exactly one of {', '.join(_WAYS)}")
    if "every" in discover and "dns" not in discover:
        text.refuse((*place, "every"), "only dns is asked again and again", "all others tell by themselves; leave `every` out")
    seen: dict[str, int] = {}
    endpoints = _endpoints(service)
    for index, (endpoint, address) in enumerate(endpoints):
        if isinstance(address, str) and seen.setdefault(address, index) != index:
            key = ("address",) if isinstance(endpoint, dict) else ()
            text.refuse(
                (*place, "static", index, *key),
                f"{address} stands here twice",
                "one entry for each address; `weight` gives it more",
            )
    weights = [endpoint.get("weight", 1) if isinstance(endpoint, dict) else 1 for endpoint, _ in endpoints]
    if weights and all(weight == 0 and not isinstance(weight, bool) for weight in weights):
        text.refuse(
            (*place, "static"),
            "all endpoints have the weight 0: nothing could be called",
            "at least one weight above 0",
        )


def _routes(text: Text, at: Path, service: Mapping[str, Any]) -> None:
    names: dict[str, Path] = {}
    for index, route in enumerate(_items(service.get("route"))):
        if not isinstance(route, dict):
            continue
        place = (*at, "route", index)
        name = route.get("name", f"{at[1]}/{index}")
        if isinstance(name, str) and names.setdefault(name, place) != place:
            text.refuse((*place, "name"), f"another route is called {name!r}, too", "logs and metrics tell routes apart by name")
        match = _mapping(route, "match")
        if "path" in match and isinstance(match["path"], dict):
            _one_of(text, (*place, "match", "path"), match["path"], ("exact", "prefix", "template"))
        for number, header in enumerate(_items(match.get("headers"))):
            if isinstance(header, dict):
                _one_of(text, (*place, "match", "headers", number), header, ("exact", "prefix", "present"))
        methods = _items(match.get("methods"))
        if service.get("protocol") == "grpc" and methods and "POST" not in methods:
            text.refuse(
                (*place, "match", "methods"),
                "every gRPC call is a POST: the route would match nothing",
                "leave methods out",
            )
        _backends(text, place, service, _items(route.get("backends")))


def _backends(text: Text, at: Path, service: Mapping[str, Any], backends: tuple[Any, ...]) -> None:
    endpoints = _endpoints(service)
    carried_by_all = [_mapping(endpoint, "labels") for endpoint, _ in endpoints]
    known = [labels for labels in carried_by_all if _is_flat(labels)]
    seen: list[Any] = []
    weights = [backend.get("weight", 1) for backend in backends if isinstance(backend, dict)]
    if weights and all(weight == 0 and not isinstance(weight, bool) for weight in weights):
        text.refuse((*at, "backends"), "all weights are 0: the route leads nowhere", "at least one weight above 0")
    has_dns = "dns" in _mapping(service, "discover")
    have = sorted({f"{key}={value}" for labels in known for key, value in labels.items()})
    for index, backend in enumerate(backends):
        labels = _mapping(backend, "labels")
        if not isinstance(backend, dict) or not _is_flat(labels) or not isinstance(backend.get("labels", {}), dict):
            continue
        place: Path = (*at, "backends", index)
        if labels in seen:
            message = f"another backend of this route has the labels {_labels(labels)}, too"
            text.refuse(place, message, "one backend for each set of labels")
        seen.append(labels)
        if labels and has_dns:
            hint = "leave labels out, or discover by static or file"
            text.refuse((*place, "labels"), "endpoints from DNS carry no labels", hint)
        if labels and endpoints and not any(labels.items() <= carried.items() for carried in known):
            hint = f"labels there are: {some(have)}" if have else "no static endpoint carries any label"
            message = f"no static endpoint carries {_labels(labels)}"
            text.refuse((*place, "labels"), message, near(_labels(labels), have) + hint)


def _choices(text: Text, at: Path, owner: Any) -> None:
    """Sections that say exactly one thing."""
    balance, rates = _mapping(owner, "balance"), _items(_mapping(owner, "admit").get("rate"))
    found: list[tuple[Path, Any, type[Choice]]] = [((*at, "balance", "sticky"), balance.get("sticky"), Sticky)]
    found += [((*at, "balance", "hash_on", index), part, HashPart) for index, part in enumerate(_items(balance.get("hash_on")))]
    for index, rate in enumerate(rates):
        parts = _items(rate.get("by")) if isinstance(rate, dict) else ()
        found += [((*at, "admit", "rate", index, "by", number), part, RatePart) for number, part in enumerate(parts)]
    for place, written, kind in found:
        # A mistyped key is told as what it is, not a second time as a missing one.
        if isinstance(written, dict) and not set(written) - set(kind.model_fields):
            _one_of(text, place, written, tuple(kind.model_fields))


def _one_of(text: Text, at: Path, given: Mapping[str, Any], ways: tuple[str, ...]) -> None:
    found = [way for way in ways if way in given]
    if len(found) != 1:
        text.refuse(at, f"{' and '.join(found) or 'no condition'} is given", f"exactly one of {', '.join(ways)}")


# ---------------------------------------------------------------- stepping over what has the wrong shape


def _mapping(value: Any, key: str) -> dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def _endpoints(service: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The static endpoints as written, each with its address."""
    static = _items(_mapping(service, "discover").get("static"))
    return [(item, item.get("address") if isinstance(item, dict) else item) for item in static]


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in inner:
        yield from _walk(item, (*path, key))


def _is_flat(labels: Mapping[str, Any]) -> bool:
    return all(isinstance(value, str) for value in labels.values())


def _labels(labels: Mapping[str, Any]) -> str:
    words = [f"{key}={value if isinstance(value, str) else shown(value)}" for key, value in labels.items()]
    return ",".join(words) or "(none)"
