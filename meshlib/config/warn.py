"""Which settings are allowed, but do nothing or more than one may think?

Warnings never stop anything: `meshlib vet` prints them beside a configuration that can be used. They are about policies
filled in, so that a setting that was inherited is seen like one that was written. Who is trusted is `secure_warn.py`'s,
and what comes in `inbound_warn.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as File

from . import inbound_warn, inert, secure_warn
from .document import Document
from .policy import GuardPolicy, ServicePolicy
from .text import Path, Text
from .values import some


def warnings(
    text: Text, folder: File, document: Document, services: Mapping[str, ServicePolicy], guards: Mapping[str, GuardPolicy]
) -> Text:
    """What is allowed, but does nothing or more than one may think; as problems of a text of its own."""
    found = Text(text.file, lines=text.lines)
    _warn_modes(found, services)
    _warn_identities(found, services)
    for service in services.values():
        at: Path = ("services", service.name)
        _warn_routes(found, at, service)
        discover = service.discover
        if discover is not None and discover.file is not None and not (folder / discover.file).exists():
            found.refuse((*at, "discover", "file"), f"{discover.file} is not there", "the service has no endpoints until it is")
        budget = service.retry.budget
        if budget.ratio == 0 and budget.per_second == 0 and any(route.retry.attempts for route in service.routes):
            found.refuse((*at, "retry"), "retries are on, but their budget is 0", "ratio or per_second above 0; or attempts: 0")
    secure_warn.warn(found, document, services)
    inert.warn(found, services, guards)
    inbound_warn.warn(found, services)
    return found


def _warn_modes(found: Text, services: Mapping[str, ServicePolicy]) -> None:
    """One warning for each place where a mode is written, not one for each service that follows it."""
    meanings = {
        "observe": ("observe: calls are plain text, and rules refuse nobody", "permissive is the next step"),
        "permissive": (
            "permissive: callers without identity are served, and rules refuse nobody",
            "enforce is the last step",
        ),
    }
    for mode, (message, hint) in meanings.items():
        places: dict[Path, list[str]] = {}
        for service in services.values():
            own: Path = ("services", service.name, "secure", "mode")
            if service.mode == mode:
                places.setdefault(own if own in found.lines else ("secure", "mode"), []).append(service.name)
        for place, names in places.items():
            found.refuse(place, f"{message}: {some(names)}", hint)


def _warn_identities(found: Text, services: Mapping[str, ServicePolicy]) -> None:
    owners: dict[str, ServicePolicy] = {}
    for service in services.values():
        owner = owners.setdefault(service.identity, service)
        if owner is not service:
            place: Path = ("services", service.name, "identity")
            found.refuse(place, f"{service.identity} is the identity of {owner.name}, too", "rules can't tell the two apart")
        place = ("services", service.name, "secure", "peer_check")
        if service.protocol != "grpc" and place in found.lines and service.peer_check != "auto":
            message = (
                f"peer_check is for gRPC, and {service.name} speaks {service.protocol}: its SPIFFE ID is checked in any case"
            )
            found.refuse(place, message, "leave it out")
    observing = {service.identity: service.name for service in services.values() if service.mode == "observe"}
    for service in services.values():
        if service.mode != "enforce":
            continue
        callers = {caller for rule in service.rules if rule.action == "allow" for caller in rule.callers}
        plain = sorted(observing[caller] for caller in callers if caller in observing)
        if plain:
            message = f"enforce, but {some(plain)} (mode observe) calls in plain text and will be refused"
            found.refuse(("services", service.name, "secure"), message, "permissive here, until all callers are")


def _warn_routes(found: Text, at: Path, service: ServicePolicy) -> None:
    covering = ""
    for index, route in enumerate(service.routes):
        place: Path = (*at, "route", index)
        if covering:
            found.refuse(place, f"never reached: the route {covering!r} before it takes every call", "put the wider route last")
        match = route.match
        is_all = match.path is None or match.path.prefix == "/"
        if is_all and not match.methods and not match.headers:
            covering = covering or route.name
        unsafe = [method for method in match.methods if method not in inert.SAFE]
        repeats = route.retry.idempotency_key or route.retry.idempotent
        is_written = (*place, "retry") in found.lines and route.retry.attempts > 0
        if is_written and unsafe and len(unsafe) == len(match.methods) and not repeats:
            hint = "idempotency_key: true if the service honours that header; idempotent: true if all calls may be doubled"
            message = f"{', '.join(unsafe)} is repeated only if nothing was written, or the caller says it is idempotent"
            found.refuse((*place, "retry"), message, hint)
        if service.discover is None and any(backend.labels for backend in route.backends):
            found.refuse((*place, "backends"), "labels without discover: nobody carries them", "discover: {static: […]}")
