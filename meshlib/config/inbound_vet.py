"""Which mistakes about what comes in show only when several values are seen together?

Two listeners at one port, a priority that anybody could claim, a limit that nobody would count, bounds turned round. As in
`vet.py`, which calls this, the raw values are read and what has the wrong shape is stepped over. What is allowed, but
without effect, is `inbound_warn.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

from .defaults import TABLE
from .inbound_document import CallerPart
from .levels import Levels
from .secure_vet import known_caller
from .text import Path, Text, dotted
from .values import is_name, near

# From the first that is turned away to the last.
_RISING: Final = ("sheddable", "sheddable_plus", "critical", "critical_plus")


def check(text: Text, raw: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    """Note every such mistake."""
    for name, service in services.items():
        if not isinstance(service, dict):
            continue
        at: Path = ("services", name)
        inbound = _mapping(service, "inbound")
        _ports(text, raw, at, service)
        _priorities(text, at, inbound, services)
        _rates(text, at, service, _mapping(raw, "stores"))
        levels = Levels("inbound", (((*at, "inbound"), inbound),))
        _shares(text, levels)
        _codel(text, levels)
        _bounds(text, Levels("admit", (((*at, "inbound"), inbound),)))
        for index, path in enumerate(_items(inbound.get("probes"))):
            if path == "/*":
                hint = "the paths of your probes; [] for none"
                text.refuse((*at, "inbound", "probes", index), "'/*' is every path: no limit would hold anybody", hint)


# ---------------------------------------------------------------- listeners


def addresses(service: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The addresses of the listeners beside the mesh port as written, each with its place in `inbound`."""
    inbound = _mapping(service, "inbound")
    public, probe = _mapping(inbound, "public"), inbound.get("probe")
    if "listen" in public:
        yield ("public", "listen"), public["listen"]
    if isinstance(probe, dict) and "listen" in probe:
        yield ("probe", "listen"), probe["listen"]
    elif isinstance(probe, str):
        yield ("probe",), probe


def _ports(text: Text, raw: Mapping[str, Any], at: Path, service: Mapping[str, Any]) -> None:
    """What a connection is taken for hangs on the port alone."""
    places: list[tuple[Path, Any]] = [((*at, "listen"), service.get("listen"))]
    places += [((*at, "inbound", *keys), address) for keys, address in addresses(service)]
    own, system = _mapping(service, "observe"), _mapping(raw, "observe")
    if "metrics" in own:
        places.append(((*at, "observe", "metrics"), own["metrics"]))
    else:
        # Told at the service, where it is one of many that the system's is good for.
        places.insert(0, (("observe", "metrics"), system.get("metrics")))
    first: dict[int, Path] = {}
    for place, address in places:
        port = _port(address)
        if place[-2:] == ("public", "listen") and port == 0:
            message = "0 is any free port, and nobody could tell it from the mesh port"
            text.refuse(place, message, "a port of its own, such as 8080")
        elif port and first.setdefault(port, place) != place:
            hint = "a port of its own for each listener: it says what a connection may do"
            text.refuse(place, f"port {port} is that of {dotted(first[port])}, too", hint)


def _port(address: Any) -> int | None:
    port = address.rpartition(":")[2] if isinstance(address, str) else ""
    return int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else None


# ---------------------------------------------------------------- limits


def _priorities(text: Text, at: Path, inbound: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    for index, one in enumerate(_items(inbound.get("priority"))):
        if not isinstance(one, dict):
            continue
        place: Path = (*at, "inbound", "priority", index)
        for number, caller in enumerate(_items(one.get("from"))):
            if not isinstance(caller, str):
                continue
            if caller == "*" and one.get("as") == "told":
                hint = "name the callers whose word counts; or say the priority: as: sheddable"
                text.refuse((*place, "from", number), "'*' is anyone, and would tell how important he is", hint)
            elif caller.startswith("*/"):
                text.refuse((*place, "from", number), f"{caller!r} would match every trust domain", "spiffe://<trust domain>/…")
            else:
                known_caller(text, (*place, "from", number), caller, services)


def _shares(text: Text, levels: Levels) -> None:
    said = [(key, *levels.number("shares", key)) for key in _RISING]
    for (low, less, less_at), (high, more, more_at) in pairwise(said):
        if less is not None and more is not None and less > more:
            message = f"{low} ({less:g}) gets more than {high} ({more:g}), which is more important"
            text.refuse(more_at or less_at, message, f"shares that rise: {' <= '.join(_RISING)}")


def _codel(text: Text, levels: Levels) -> None:
    target, target_at = levels.number("codel", "target")
    interval, interval_at = levels.number("codel", "interval")
    if target is not None and interval is not None and target > interval:
        message = f"target {target:g} s is above interval {interval:g} s: calls would wait longer when the queue stands"
        text.refuse(target_at or interval_at, message, "target below interval, such as 5ms and 100ms")


def _bounds(text: Text, levels: Levels) -> None:
    bounds = [levels.number("adaptive_limits", key) for key in ("least", "initial", "most")]
    (least, _), (initial, _), (most, _) = bounds
    place = max((place for _, place in bounds), key=len)
    if least is not None and initial is not None and most is not None and not least <= initial <= most:
        message = f"least {least:g}, initial {initial:g}, most {most:g} don't rise"
        text.refuse(place[:-1], message, "least <= initial <= most")


def _rates(text: Text, at: Path, service: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
    names: set[str] = set()
    for index, rate in enumerate(_items(_mapping(service, "inbound").get("rate"))):
        if not isinstance(rate, dict):
            continue
        place: Path = (*at, "inbound", "rate", index)
        name = rate.get("name", f"{at[1]}/inbound/{index}")
        if isinstance(name, str):
            if name in names:
                text.refuse((*place, "name"), f"another rate is called {name!r}, too", "refusals tell rates apart by name")
            names.add(name)
        for number, part in enumerate(_items(rate.get("by"))):
            found = [way for way in CallerPart.model_fields if way in part] if isinstance(part, dict) else [""]
            # A mistyped key is told as what it is, not a second time as a missing one.
            if len(found) > 1 or (not found and not set(part) - set(CallerPart.model_fields)):
                message = f"{' and '.join(found) or 'nothing'} is given"
                text.refuse((*place, "by", number), message, f"exactly one of {', '.join(CallerPart.model_fields)}")
        store = rate.get("store", TABLE["admit.rate.store"].value)
        if not isinstance(store, str) or not is_name(store) or store == "local":
            continue
        if store not in stores:
            hint = f"{near(store, [*stores, 'local'])}local, or a section `stores: {{{store}: {{url: …}}}}`"
            text.refuse((*place, "store"), f"the store {store!r} is not configured", hint)


# ---------------------------------------------------------------- stepping over what has the wrong shape


def _mapping(value: Any, key: str) -> dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()
