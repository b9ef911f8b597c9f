"""Is what is written for a registry's package right, as far as the package can tell without asking anybody?

`meshlib vet` has all that a file names made by the installed packages, and throws it away: the registries, a resolver for each service
that is looked up in one, an entry for each that is entered. Making them opens no connection (`registry.py`). As in `meshlib.config.vet`
the raw values are read and what has the wrong shape is stepped over, so that these mistakes are told together with all others; and where
a registry's own settings are wrong, what is likely to be meant stands in for them, so that they hide none of those that use it.

What depends on the machine (a CA that lies elsewhere) is a warning here: vet speaks of the file. The start is stricter.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from meshlib.config.discover_document import Discover, Register
from meshlib.config.discover_document import Registry as Section
from meshlib.config.plugin import noting
from meshlib.config.text import Path, Text
from meshlib.config.values import is_name, nearest
from meshlib.errors import ConfigError, MeshError, Problem

from .registration import for_package, foreseen
from .registry import Registry, open_registry
from .srv import SrvResolver

Open = Callable[[str, Mapping[str, Any]], Registry]


def check(text: Text, warnings: list[Problem], *, open_one: Open = open_registry) -> None:
    """Note every mistake that the packages find, and as `warnings` what is only wrong on this machine."""
    opened: dict[str, Registry] = {}
    for name, section in _mapping(text.value, "registries").items():
        plugin = section.get("plugin", name) if isinstance(section, dict) else None
        if not isinstance(plugin, str) or not is_name(plugin):
            continue
        settings = _rest(section, Section)
        with _judging(text, warnings, ("registries", name)):
            try:
                opened[name] = open_one(plugin, settings)
            except ConfigError as error:
                for meant in _meant(settings, error):
                    with contextlib.suppress(MeshError):
                        opened[name] = open_one(plugin, meant)
                        break
                raise
    for name, service in _mapping(text.value, "services").items():
        _service(text, warnings, name, service, opened)


def _service(text: Text, warnings: list[Problem], name: str, service: Any, opened: Mapping[str, Registry]) -> None:
    for registry, key, settings in _uses(service):
        if registry in opened:
            with _judging(text, warnings, ("services", name, key)):
                if key == "discover":
                    opened[registry].resolver(name, settings)
                else:
                    _enter(opened[registry], name, service, settings)
    records = _mapping(service, "discover").get("srv")
    if isinstance(records, str):
        with _judging(text, warnings, ("services", name, "discover")):
            SrvResolver(name, records)


def _enter(registry: Registry, name: str, service: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    listen, address = service.get("listen"), _mapping(service, "register").get("address")
    instance = foreseen(
        name,
        listen if isinstance(listen, str) else "",
        address=address if isinstance(address, str) else "",
        protocol=str(service.get("protocol", "http")),
        settings=settings,
    )
    registry.register(instance, for_package(settings))


def _uses(service: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The registries that a service names, with the key where it does so, and what it says to their packages."""
    for key, kind in (("discover", Discover), ("register", Register)):
        written = service.get(key) if isinstance(service, dict) else None
        section = {"registry": written} if isinstance(written, str) else written
        if isinstance(section, dict) and isinstance(section.get("registry"), str):
            yield section["registry"], key, _rest(section, kind)


def _rest(section: Mapping[str, Any], kind: type[Section | Discover | Register]) -> dict[str, Any]:
    """What is for the package: all keys but our own."""
    return {key: value for key, value in section.items() if key not in kind.model_fields}


def _meant(settings: Mapping[str, Any], error: ConfigError) -> Iterator[dict[str, Any]]:
    """What was probably meant by settings that are refused: their keys as they are known; and that without one of them."""
    keys = {key: nearest(key, error.known) if key in error.unknown else key for key in settings}
    spelt = {keys[key]: value for key, value in settings.items() if keys[key]}
    yield spelt
    for left_out in spelt:
        yield {key: value for key, value in spelt.items() if key != left_out}


@contextlib.contextmanager
def _judging(text: Text, warnings: list[Problem], at: Path) -> Iterator[None]:
    """What goes wrong in here is noted, as a warning where a file of this machine is the reason."""
    here = Text(text.file, lines=text.lines)
    reason: BaseException | None = None
    with noting(here, at):
        try:
            yield
        except Exception as error:
            reason = error.__context__
            raise
    is_of_machine = isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError)
    (warnings if is_of_machine else text.problems).extend(here.problems)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}
