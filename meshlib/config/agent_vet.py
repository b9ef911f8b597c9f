"""Which mistakes about registries and the node agent show only when several values are seen together?

A registry that isn't configured, an agent without an identity to give, an entry for a service that there is not. As in
`vet.py`, which calls this, the raw values are read and what has the wrong shape is stepped over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .text import Path, Text
from .values import is_name, near, some

_SOCKETS: Final = ("socket", "data", "admin")


def check(text: Text, raw: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    """Note every such mistake."""
    registries = _mapping(raw, "registries")
    has_agent = isinstance(raw.get("agent"), dict)
    if raw.get("delegate") == "agent" and not has_agent:
        _needs_agent(text, ("delegate",))
    if _mapping(_mapping(raw, "secure"), "identity").get("agent") is True and not has_agent:
        _needs_agent(text, ("secure", "identity", "agent"))
    for name, service in services.items():
        at: Path = ("services", name)
        if not isinstance(service, dict):
            continue
        if service.get("delegate") == "agent" and not has_agent:
            _needs_agent(text, (*at, "delegate"))
        if "agent" in _mapping(service, "inbound"):
            if not has_agent:
                _needs_agent(text, (*at, "inbound", "agent"))
            if "listen" not in service:
                text.refuse((*at, "listen"), "is missing: where the agent takes its calls", "listen: 0.0.0.0:8443")
        for key in ("discover", "register"):
            written = service.get(key)
            named = written if isinstance(written, str) else _mapping(service, key).get("registry")
            if isinstance(named, str) and is_name(named) and named not in registries:
                place = (*at, key) if isinstance(written, str) else (*at, key, "registry")
                hint = f"{near(named, registries)}a section `registries: {{{named}: {{…}}}}`"
                text.refuse(place, f"the registry {named!r} is not configured", hint)
        if "register" in service and "listen" not in service and "address" not in _mapping(service, "register"):
            text.refuse((*at, "register"), "nothing says where its processes are reached", "listen: 0.0.0.0:8443; or address")
    if has_agent:
        _agent(text, raw["agent"], services)


def _agent(text: Text, agent: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    at: Path = ("agent",)
    ways = [way for way in ("ca", "enrol") if way in agent]
    if len(ways) != 1:
        text.refuse(at, f"{' and '.join(ways) or 'nothing'} is given", "exactly one of ca (a folder) and enrol (a URL)")
    seen: dict[str, str] = {}
    for key in _SOCKETS:
        path = agent.get(key)
        if isinstance(path, str) and seen.setdefault(path, key) != key:
            text.refuse((*at, key), f"{path} is {seen[path]}, too", "a path for each of the three sockets")
    entries = agent.get("entries")
    for index, entry in enumerate(entries if isinstance(entries, tuple) else ()):
        if not isinstance(entry, dict):
            continue
        place: Path = (*at, "entries", index)
        service = entry.get("service")
        if isinstance(service, str) and is_name(service) and service not in services:
            text.refuse(
                (*place, "service"), f"there is no service {service!r}", f"{near(service, services)}one of {some(services)}"
            )
        if "token" in entry and "enrol" not in agent:
            text.refuse((*place, "token"), "token is only for a CA that is asked", "enrol: https://ca.host:8444; or leave it out")


def _needs_agent(text: Text, place: Path) -> None:
    text.refuse(place, "there is no agent in this file", "a section `agent: {ca: ca, entries: […]}`, for `meshlib agent run`")


def _mapping(value: Any, key: str) -> dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}
