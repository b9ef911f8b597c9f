"""What do the levels of a file (system, service, guard) say together, and where is it mended?

A timeout in one place and an interval in another can contradict each other only after they were merged. So the raw
values are read level by level, as `policy.merge` will read them, and each mistake is told at the line that has the
last word. What has the wrong shape is stepped over: the types report that.

It checks what must not be; what is merely without effect is `warn.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .defaults import TABLE
from .text import Path, Text, dotted
from .values import is_name, near, seconds, some

HASHING: Final = ("ring_hash", "maglev")


@dataclass(frozen=True, slots=True)
class Levels:
    """The sections of one kind that count for one service or guard, the most general first, each with its place."""

    kind: str
    sections: tuple[tuple[Path, Mapping[str, Any]], ...]

    def said(self, *keys: str) -> tuple[Any, Path]:
        """The value that counts, and where it stands; the default and () if nobody says anything."""
        for place, section in reversed(self.sections):
            value: Any = section
            for key in keys:
                value = value.get(key, _NOTHING) if isinstance(value, dict) else _NOTHING
            if value is not _NOTHING:
                return value, (*place, *keys)
        row = TABLE.get(".".join((self.kind, *keys)))
        return (None if row is None else row.value), ()

    def number(self, *keys: str) -> tuple[float | None, Path]:
        """The same for a number or duration; None if what stands there is none."""
        value, place = self.said(*keys)
        try:
            found = seconds(value) if isinstance(value, str) and TABLE[".".join((self.kind, *keys))].unit == "s" else value
        except ValueError:
            return None, place
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return (float(found) if is_number else None), place

    def after_off(self, key: str) -> Levels:
        """From the last level on that says `off`: what stands above it doesn't count any more."""
        begin = 0
        for index, (_, section) in enumerate(self.sections):
            begin = index + 1 if section.get(key) == "off" else begin
        return Levels(self.kind, self.sections[begin:])


_NOTHING: Final = object()


def check(text: Text, raw: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    """Note every mistake that needs more than one level to be seen."""
    report = _Report(text)
    for name, service in services.items():
        at: Path = ("services", name)
        _hashing(report, _levels("balance", ((), raw), (at, service)), service)
        admit = _levels("admit", ((), raw), (at, service))
        _check(report, admit.after_off("check"))
        if isinstance(service, dict) and service.get("protocol") == "grpc":
            _grpc(report, at, admit)
    guards: list[tuple[Path, Any]] = [(("guards", name), guard) for name, guard in _mapping(raw, "guards").items()]
    for place, whole in [((), {}), *((("services", name), service) for name, service in services.items()), *guards]:
        _admit(report, _levels("admit", ((), raw), (place, whole)))
    report.end()
    _rates(text, raw, services, guards)
    if "local" in _mapping(raw, "stores"):
        text.refuse(("stores", "local"), "local is no store: it is each process by itself", "the name of a plugin, such as redis")


class _Report:
    """Each mistake once, however many services inherit it."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._seen: set[tuple[Path, str]] = set()
        self._inert: dict[Path, tuple[bool, str, str]] = {}

    def refuse(self, place: Path, message: str, hint: str) -> None:
        if (place, message) not in self._seen:
            self._seen.add((place, message))
            self._text.refuse(place, message, hint)

    def expect(self, place: Path, is_met: bool, message: str, hint: str) -> None:
        """A mistake unless at least one of those that read this place has a use for it."""
        was_met = self._inert.get(place, (False, "", ""))[0]
        self._inert[place] = (was_met or is_met, message, hint)

    def end(self) -> None:
        for place, (is_met, message, hint) in self._inert.items():
            if not is_met:
                self.refuse(place, message, hint)


def _hashing(report: _Report, levels: Levels, service: Any) -> None:
    policy, place = levels.said("policy")
    parts, parts_at = levels.said("hash_on")
    if policy in HASHING and parts == ():
        hint = "hash_on: [{header: x-user}], or a cookie, a path variable, or the peer"
        report.refuse(place, f"{policy} without hash_on: nothing says which calls belong together", hint)
    variables = _variables(service)
    for index, part in enumerate(_items(parts)):
        name = part.get("path") if isinstance(part, dict) else None
        if isinstance(name, str) and name.isidentifier():  # the types report what can't be a name at all
            hint = f"{near(name, variables)}variables there are: {some(variables)}" if variables else "a template: /items/{id}"
            message = f"no template of a route has {{{name}}}"
            report.expect((*parts_at, index, "path"), name in variables, message, hint)


def _admit(report: _Report, levels: Levels) -> None:
    bounds = [levels.number("adaptive_limits", key) for key in ("least", "initial", "most")]
    (least, _), (initial, _), (most, _) = bounds
    if least is not None and initial is not None and most is not None and not least <= initial <= most:
        place = max((place for _, place in bounds), key=len)
        report.refuse(place[:-1], f"least {least:g}, initial {initial:g}, most {most:g} don't rise", "least <= initial <= most")
    slow, _ = levels.number("breaker", "slow")
    _, rate_at = levels.said("breaker", "slow_rate")
    if rate_at and slow is not None:
        report.expect(rate_at, slow > 0, "slow_rate without slow: no call is slow", "slow: 1s, or leave slow_rate out")


def _check(report: _Report, levels: Levels) -> None:
    timeout, timeout_at = levels.number("check", "timeout")
    every, every_at = levels.number("check", "every")
    if timeout is not None and every is not None and timeout >= every:
        hint = "timeout below every, so that one question is over before the next"
        place = max(timeout_at, every_at, key=len)
        report.refuse(place, f"timeout {timeout:g} s is not below every {every:g} s", hint)


def _grpc(report: _Report, at: Path, levels: Levels) -> None:
    """A limit that nobody counts must not look like one."""
    rates, place = levels.said("rate")
    for index, rate in enumerate(_items(rates)):
        store = rate.get("store", "local") if isinstance(rate, dict) else "local"
        if not isinstance(store, str) or store == "local" or not is_name(store):
            continue
        message = f"calls of protocol grpc are not counted in {store} yet: this limit would hold nobody"
        if place[: len(at)] == at:
            report.refuse((*place, index, "store"), message, "local: each process counts its own")
        else:
            hint = f"admit: {{rate: […]}} of its own for {at[1]}, with store: local; rate: [] for none"
            report.refuse((*at, "protocol"), f"{dotted((*place, index))}: {message}", hint)


def _rates(text: Text, raw: Mapping[str, Any], services: Mapping[str, Any], guards: list[tuple[Path, Any]]) -> None:
    stores = _mapping(raw, "stores")
    places = [((), raw), *((("services", name), service) for name, service in services.items()), *guards]
    for at, owner in places:
        names: set[str] = set()
        for index, rate in enumerate(_items(_mapping(owner, "admit").get("rate"))):
            if not isinstance(rate, dict):
                continue
            place: Path = (*at, "admit", "rate", index)
            name, store = rate.get("name"), rate.get("store", "local")
            if isinstance(name, str):
                if name in names:
                    text.refuse((*place, "name"), f"another rate is called {name!r}, too", "refusals tell rates apart by name")
                names.add(name)
            if at[:1] == ("guards",):
                _rate_of_a_guard(text, place, rate, store)
            elif isinstance(store, str) and is_name(store) and store != "local" and store not in stores:
                hint = f"{near(store, [*stores, 'local'])}local, or a section `stores: {{{store}: {{url: …}}}}`"
                text.refuse((*place, "store"), f"the store {store!r} is not configured", hint)


def _rate_of_a_guard(text: Text, place: Path, rate: Mapping[str, Any], store: Any) -> None:
    if isinstance(store, str) and store != "local":
        text.refuse((*place, "store"), "a guarded function is counted in its own process", "leave store out")
    for number, part in enumerate(_items(rate.get("by"))):
        if isinstance(part, dict) and "header" in part:
            text.refuse((*place, "by", number), "a function has no headers", "service: all its calls; or peer")


# ---------------------------------------------------------------- stepping over what has the wrong shape


def _levels(kind: str, *owners: tuple[Path, Any]) -> Levels:
    return Levels(kind, tuple(((*at, kind), _mapping(owner, kind)) for at, owner in owners))


def _variables(service: Any) -> list[str]:
    found: list[str] = []
    for route in _items(service.get("route")) if isinstance(service, dict) else ():
        template = _mapping(_mapping(route, "match"), "path").get("template")
        if isinstance(template, str):
            found += [part[1:-1] for part in template.split("/") if part.startswith("{") and part.endswith("}")]
    return found


def _mapping(value: Any, key: str) -> dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()
