"""How does a file become a configuration?

Read, parse, check the types, check the whole, fill in: each step notes its mistakes, and only a file without any
becomes a `Config`. All mistakes are told at once. Nothing is loaded in part, and nothing is guessed: which file and
which service are named by the caller or by the environment, and the only guess is a service that is the only one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from meshlib.errors import ConfigError, Problem

from . import agent_policy, judged, problems, secure_policy, vet, warn
from .discover_document import Endpoint, EndpointSettings
from .document import Document, Store
from .names import Names
from .policy import Config, GuardPolicy, ServicePolicy, resolve, resolve_guards
from .secure_policy import IdentityChoice
from .source import ConfigSource, is_url, open_source, read_source, shown
from .text import Text, parse
from .values import Zone, near, some


@dataclass(frozen=True, slots=True)
class Examined:
    """A file without mistakes, before it is known which service this process is."""

    file: Path
    text: Text = field(repr=False)  # what stands under `stores` may be secret
    source: str
    document: Document
    names: Names
    services: dict[str, ServicePolicy]
    guards: dict[str, GuardPolicy]
    dev_folder: Path | None
    warnings: tuple[Problem, ...]
    origin: ConfigSource | None = field(default=None, repr=False)
    url: str = field(default="", repr=False)
    fresh: bytes = field(default=b"", repr=False)

    @property
    def label(self) -> str:
        """How people find it: the file, or the URL without what may be a password."""
        return shown(self.url) if self.url else str(self.file)

    @property
    def place(self) -> str:
        """By what it is read again. A URL may hold a secret."""
        return self.url or str(self.file)


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    service: str | None = None,
    zone: str | None = None,
    origin: ConfigSource | None = None,
) -> Config:
    """The configuration of this process.

    `source` is a file, or the URL of a `ConfigSource` (which is `origin`, if it is open already); without it $MESHLIB_CONFIG, then
    ./mesh.yaml. `service` says which service this process is;
    without it $MESHLIB_SERVICE, then the only one there is. `zone` says where it runs; without it $MESHLIB_ZONE, and
    "" is nowhere in particular. Raises ConfigError with all problems.
    """
    examined = examine(source, origin=origin)
    where = _zone(examined, zone)
    name = service or os.environ.get("MESHLIB_SERVICE") or None
    known = list(examined.services)
    if name is None and len(known) == 1:
        name = known[0]
    if name is None or name not in examined.services:
        key = "service" if service else "MESHLIB_SERVICE"
        line = examined.text.line_of(("services",))
        message = f"{name!r} is no service of this file" if name else "not set, so it is unknown which service this process is"
        hint = f"{near(name, known) if name else ''}one of {some(known)}"
        raise ConfigError([Problem(examined.label, line, key, message, hint)])
    document, secure = examined.document, examined.document.secure
    folder, is_dev = examined.file.parent, examined.dev_folder is not None
    node = agent_policy.agent(document.agent, folder)
    identity = secure_policy.identity(secure.identity, folder, "" if node is None else node.socket)
    if is_dev:
        identity = IdentityChoice("folder", folder=examined.dev_folder)
    own = examined.services[name]
    return Config(
        name=document.mesh,
        file=examined.file,
        service=name,
        secure=secure.model_copy(update={"trust_domain": examined.names.trust_domain}),
        observe=own.observe,
        services=MappingProxyType(examined.services),
        trust_domain=examined.names.trust_domain,
        egress=document.egress.policy,
        deadline=document.deadline,
        identity_folder=None if identity is None else identity.folder,
        is_dev=is_dev,
        source=examined.source,
        zone=where,
        guards=MappingProxyType(examined.guards),
        stores=MappingProxyType({name: _settings(store) for name, store in document.stores.items()}),
        warnings=examined.warnings,
        identity_source=identity,
        # The throw-away CA of `meshlib dev` is for this machine: nobody else's is trusted beside it.
        federation={} if is_dev else secure_policy.federation(secure.federation, folder),
        jwt=secure_policy.providers(secure.jwt, folder, examined.names),
        proxies=secure_policy.proxies(secure.proxies, examined.names),
        egress_hosts=document.egress.hosts,
        egress_credentials=secure_policy.credentials(document.egress.credentials, folder),
        record=secure_policy.record(secure.record, folder),
        registries=agent_policy.registries(document.registries, folder),
        agent=node,
        origin=examined.origin,
        url=examined.url,
        fresh=examined.fresh,
        places=_places(examined),
    )


def examine(
    source: str | os.PathLike[str] | None = None,
    *,
    origin: ConfigSource | None = None,
    check: Callable[[Text], object] | None = None,
) -> Examined:
    """Read and check a file, without asking which service this process is. Raises ConfigError with all problems.

    `check` may look at the text and note what else is wrong; what has the wrong shape is told already.
    """
    named = source if source is not None else os.environ.get("MESHLIB_CONFIG") or "mesh.yaml"
    url = str(named) if is_url(named) else ""
    is_fresh = False
    if url:
        origin, document_read, is_fresh = _read_url(url, origin)
        file, label = Path(url.rpartition("/")[2] or "mesh.yaml"), shown(url)
        content = _decoded(document_read, label)
    else:
        file, label = Path(named), str(named)
        content = _read(file, is_named=source is not None or bool(os.environ.get("MESHLIB_CONFIG")))
    dev = os.environ.get("MESHLIB_DEV") or None
    text = parse(content, label)
    document: Document | None = None
    if text.value is None and not text.problems:
        text.refuse((), "the file is empty", "`meshlib init` writes one to begin with")
    elif text.value is not None and not isinstance(text.value, dict):
        text.refuse((), f"must be a mapping, not {problems.shown(text.value)}", "mesh: …, secure: …, services: …")
    elif text.value is not None:
        try:
            document = Document.model_validate(text.value)
        except ValidationError as error:
            problems.note(text, error)
        vet.check(text, is_dev=dev is not None)
        if check is not None:
            check(text)
    if text.problems or document is None:
        raise ConfigError(sorted(text.problems, key=lambda problem: problem.line))
    names = Names(document, is_dev=dev is not None)
    services = resolve(document, names)
    guards = resolve_guards(document)
    judged.check(text, services, secure_policy.providers(document.secure.jwt, file.parent, names))
    if text.problems:
        raise ConfigError(text.problems)
    return Examined(
        file=file.absolute(),
        text=text,
        source=hashlib.sha256(content.encode()).hexdigest(),
        document=document,
        names=names,
        services=services,
        guards=guards,
        dev_folder=None if dev is None else Path(dev).absolute(),
        warnings=tuple(warn.warnings(text, file.parent, document, services, guards).problems),
        origin=origin,
        url=url,
        fresh=content.encode() if is_fresh else b"",
    )


def _zone(examined: Examined, named: str | None) -> str:
    """Where this process runs. Not in the file: it is shared by processes in all zones."""
    zone = os.environ.get("MESHLIB_ZONE", "") if named is None else named
    try:
        return TypeAdapter(Zone).validate_python(zone) if zone else ""
    except ValidationError as error:
        context = error.errors()[0].get("ctx", {})
        key = "MESHLIB_ZONE" if named is None else "zone"
        problem = Problem(examined.label, 1, key, str(context.get("message")), str(context.get("hint")))
    raise ConfigError([problem])


def _settings(store: Store) -> Mapping[str, Any]:
    """What a store's plugin gets: all keys that are written, and the time it has."""
    return MappingProxyType({name: value for name, value in store if value is not None})


def read_endpoints(source: str | os.PathLike[str]) -> tuple[EndpointSettings, ...]:
    """The endpoints of a file that `discover: {file: …}` names: a YAML list as under `static`. Raises ConfigError."""
    file = Path(source)
    text = parse(_read(file, is_named=True), str(file))
    found: tuple[EndpointSettings, ...] = ()
    if not text.problems:
        value: Any = () if text.value is None else text.value
        try:
            found = TypeAdapter(tuple[Endpoint, ...]).validate_python(value)
        except ValidationError as error:
            problems.note(text, error, tuple[Endpoint, ...])
    addresses = [endpoint.address for endpoint in found]
    for index, address in enumerate(addresses):
        if address in addresses[:index]:
            text.refuse((index,), f"{address} stands here twice", "one entry for each address; `weight` gives it more")
    if text.problems:
        raise ConfigError(text.problems)
    return found


def _places(examined: Examined) -> Text:
    """The lines of `registries`, and of `discover` and `register` of each service; not of what is written in them by the thousand."""
    lines = {
        path: line
        for path, line in examined.text.lines.items()
        if path[0] == "registries"
        or (path[0] == "services" and (len(path) <= 2 or path[2] in ("discover", "register")) and path[3:4] != ("static",))
    }
    return Text(examined.label, lines=lines)


def _read_url(url: str, origin: ConfigSource | None) -> tuple[ConfigSource, bytes, bool]:
    """The source, the document and whether it is fresh. What the source's package says of them is told with the URL."""
    label = shown(url)
    try:
        origin = origin or open_source(url)
        return origin, *read_source(origin, url)
    except ConfigError as error:
        if error.problems:
            raise
        message = error.message.removeprefix(f"{label}: ").rstrip(".")
        raise ConfigError([Problem(label, 1, "(source)", message, error.hint.rstrip("."))]) from None


def _decoded(content: bytes, label: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError([Problem(label, line, "(file)", "is not UTF-8 text", "save it as UTF-8")]) from None


def _read(file: Path, *, is_named: bool) -> str:
    try:
        return _decoded(file.read_bytes(), str(file))
    except FileNotFoundError:
        hint = "check the path" if is_named else "`meshlib init` writes one; or name yours in MESHLIB_CONFIG"
        raise ConfigError([Problem(str(file), 1, "(file)", "is not there", hint)]) from None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        hint = "a file that this user may read"
        raise ConfigError([Problem(str(file), 1, "(file)", f"can't be read: {reason}", hint)]) from None
