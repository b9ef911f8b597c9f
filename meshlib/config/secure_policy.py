"""Who is trusted, after all that was left out has been filled in?

The frozen values that the other modules read: where the identity comes from, which other trust domains and tokens are
believed, what the rules say. Callers are complete SPIFFE IDs, paths of files absolute. There is no secret in any of
them: they say where it is, and who needs it reads it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import secure_document as doc
from .names import Names
from .secure_values import SVID_ALGORITHMS


@dataclass(frozen=True, slots=True)
class IdentityChoice:
    """Where the identity comes from. `kind` is folder, files, ca, agent or plugin, and says which of the others count.

    `settings` are the further keys of a plugin, of which nobody here knows whether they are secret.
    """

    kind: str
    folder: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    bundle: Path | None = None
    crl: Path | None = None
    ca: str = ""
    token: Path | None = None
    state: Path | None = None
    socket: str = ""
    plugin: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class FederationPolicy:
    """Another trust domain. `url` is "" where `file` is all there is; with a url, `file` is the first bundle."""

    trust_domain: str
    file: Path | None
    url: str
    profile: str
    spiffe_id: str
    every: float
    can_be_local: bool


@dataclass(frozen=True, slots=True)
class TokenPlace:
    """Where a token is looked for. `kind` is header, cookie or query; `prefix` stands before it in a header."""

    kind: str
    name: str
    prefix: str


@dataclass(frozen=True, slots=True)
class JwksChoice:
    """Where keys come from. `kind` is url, file, keys (a JWKS document), or bundle: the trust domain's own."""

    kind: str
    url: str = ""
    file: Path | None = None
    keys: bytes = field(default=b"", repr=False)
    can_be_local: bool = False


@dataclass(frozen=True, slots=True)
class ProviderPolicy:
    """Whose tokens are believed. With `is_svid` they are JWT-SVIDs, and `issuer` is their trust domain."""

    name: str
    issuer: str
    audiences: tuple[str, ...]
    algorithms: tuple[str, ...]
    leeway: float
    longest: float
    places: tuple[TokenPlace, ...]
    is_forwarded: bool
    is_svid: bool
    jwks: JwksChoice


@dataclass(frozen=True, slots=True)
class ProxiesPolicy:
    """Who is believed about where a call comes from. `callers` are as in rules; 0 hops believe nobody."""

    callers: tuple[str, ...] = ()
    cidrs: tuple[str, ...] = ()
    hops: int = 0


@dataclass(frozen=True, slots=True)
class CredentialPolicy:
    """What is added to calls to one host outside. Exactly one of `env` (else "") and `file` says where the secret is."""

    host: str
    header: str
    prefix: str
    env: str
    file: Path | None


@dataclass(frozen=True, slots=True)
class WhenPolicy:
    """One more condition of a rule."""

    key: str
    values: tuple[str, ...]
    not_values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RulePolicy:
    """An inbound rule. `callers` are "*", SPIFFE IDs, or beginnings of SPIFFE IDs with a `*` at the end.

    `action` is custom, deny or allow. Texts and paths are as they were written; an empty list is no condition.
    """

    name: str
    action: str
    callers: tuple[str, ...]
    not_callers: tuple[str, ...]
    namespaces: tuple[str, ...]
    not_namespaces: tuple[str, ...]
    request_principals: tuple[str, ...]
    not_request_principals: tuple[str, ...]
    ip_blocks: tuple[str, ...]
    not_ip_blocks: tuple[str, ...]
    remote_ip_blocks: tuple[str, ...]
    not_remote_ip_blocks: tuple[str, ...]
    methods: tuple[str, ...]
    not_methods: tuple[str, ...]
    paths: tuple[str, ...]
    not_paths: tuple[str, ...]
    path_regexes: tuple[str, ...]
    not_path_regexes: tuple[str, ...]
    hosts: tuple[str, ...]
    not_hosts: tuple[str, ...]
    ports: tuple[int, ...]
    not_ports: tuple[int, ...]
    when: tuple[WhenPolicy, ...]
    authorizer: str
    is_case_insensitive: bool
    is_dry_run: bool
    place: tuple[str | int, ...] = field(default=(), repr=False)  # where it stands in the file


# The clauses that are taken over as they are written.
_AS_WRITTEN = (
    "namespaces", "not_namespaces", "request_principals", "not_request_principals",
    "ip_blocks", "not_ip_blocks", "remote_ip_blocks", "not_remote_ip_blocks", "methods", "not_methods",
    "paths", "not_paths", "path_regexes", "not_path_regexes", "hosts", "not_hosts", "ports", "not_ports",
)  # fmt: skip


def rules(owner: str, written: doc.Secure | doc.ServiceSecure, names: Names) -> tuple[RulePolicy, ...]:
    """The rules of a service, or of the system ("*"), in the order in which they are judged."""
    actions: tuple[tuple[str, tuple[doc.Rule, ...]], ...] = (
        ("custom", written.custom),
        ("deny", written.deny),
        ("allow", written.allow),
    )
    at: tuple[str, ...] = () if owner == "*" else ("services", owner)
    return tuple(
        _rule(rule, f"{owner}/{action}/{index}", action, (*at, "secure", action, index), names)
        for action, listed in actions
        for index, rule in enumerate(listed)
    )


def public_rules(service: str, written: Iterable[doc.Rule], names: Names) -> tuple[RulePolicy, ...]:
    """The rules that let in at the public listener of a service."""
    at = ("services", service, "inbound", "public", "allow")
    return tuple(_rule(rule, f"{service}/public/{index}", "allow", (*at, index), names) for index, rule in enumerate(written))


def _rule(rule: doc.Rule, name: str, action: str, place: tuple[str | int, ...], names: Names) -> RulePolicy:
    return RulePolicy(
        name=rule.name or name,
        action=action,
        callers=names.callers(rule.from_, rule.trust_domains),
        not_callers=names.callers(rule.not_from, rule.trust_domains),
        when=tuple(WhenPolicy(one.key, one.values, one.not_values) for one in rule.when),
        authorizer=rule.authorizer if isinstance(rule, doc.CustomRule) else "",
        is_case_insensitive=rule.case == "insensitive",
        is_dry_run=rule.dry_run,
        place=place,
        **{name: getattr(rule, name) for name in _AS_WRITTEN},
    )


def identity(written: doc.IdentityWay | None, folder: Path, socket: str = "") -> IdentityChoice | None:
    """Where the identity comes from; relative paths are relative to the file's folder. `socket` is the node agent's."""
    if written is None:
        return None
    if written.folder is not None:
        return IdentityChoice("folder", folder=_absolute(folder, written.folder))
    if written.files is not None:
        files = written.files
        return IdentityChoice(
            "files",
            certificate=_absolute(folder, files.certificate),
            key=_absolute(folder, files.key),
            bundle=_absolute(folder, files.bundle),
            crl=_absolute(folder, files.crl),
        )
    if written.ca is not None:
        return IdentityChoice("ca", ca=written.ca, token=_absolute(folder, written.token), state=_absolute(folder, written.state))
    if written.agent is not None:
        return IdentityChoice("agent", socket=f"unix://{socket}" if written.agent is True else written.agent)
    return IdentityChoice("plugin", plugin=written.plugin or "", settings=MappingProxyType(dict(written.model_extra or {})))


def federation(written: Mapping[str, doc.Trusted], folder: Path) -> Mapping[str, FederationPolicy]:
    """The other trust domains, by name."""
    return MappingProxyType(
        {
            domain: FederationPolicy(
                trust_domain=domain,
                file=_absolute(folder, trusted.file),
                url=trusted.url or "",
                profile=trusted.profile or "",
                spiffe_id=trusted.spiffe_id or "",
                # What isn't written leaves it to the hint in the bundle.
                every=trusted.every if "every" in trusted.model_fields_set else 0.0,
                can_be_local=trusted.local,
            )
            for domain, trusted in written.items()
        }
    )


def providers(written: Mapping[str, doc.Provider], folder: Path, names: Names) -> Mapping[str, ProviderPolicy]:
    """Whose tokens are believed, by name."""
    return MappingProxyType({name: _provider(name, provider, folder, names) for name, provider in written.items()})


def _provider(name: str, written: doc.Provider, folder: Path, names: Names) -> ProviderPolicy:
    is_svid = written.trust_domain is not None
    has_said = "algorithms" in written.model_fields_set
    return ProviderPolicy(
        name=name,
        issuer=names.domain(written.trust_domain) if written.trust_domain is not None else written.issuer or "",
        audiences=tuple(dict.fromkeys(written.audiences)),
        algorithms=SVID_ALGORITHMS if is_svid and not has_said else tuple(dict.fromkeys(written.algorithms)),
        leeway=written.leeway,
        longest=written.longest,
        places=tuple(dict.fromkeys(_place(place) for place in written.from_)),
        is_forwarded=written.forward,
        is_svid=is_svid,
        jwks=_jwks(written.jwks, folder),
    )


def _place(written: doc.TokenFrom) -> TokenPlace:
    if written.header is not None:
        return TokenPlace("header", written.header, _before(written.header, written.prefix))
    return (
        TokenPlace("cookie", written.cookie, "") if written.cookie is not None else TokenPlace("query", written.query or "", "")
    )


def _before(header: str, prefix: str | None) -> str:
    return prefix if prefix is not None else "Bearer " if header == "authorization" else ""


def _jwks(written: doc.Jwks | None, folder: Path) -> JwksChoice:
    if written is None:
        return JwksChoice("bundle")
    if written.url is not None:
        return JwksChoice("url", url=written.url, can_be_local=written.local)
    if written.file is not None:
        return JwksChoice("file", file=_absolute(folder, written.file))
    return JwksChoice("keys", keys=json.dumps({"keys": written.keys or ()}, ensure_ascii=False).encode())


def proxies(written: doc.Proxies | None, names: Names) -> ProxiesPolicy:
    """Who is believed about where a call comes from."""
    if written is None:
        return ProxiesPolicy()
    return ProxiesPolicy(names.callers(written.identities), tuple(dict.fromkeys(written.cidrs)), written.hops)


def credentials(written: tuple[doc.Credential, ...], folder: Path) -> tuple[CredentialPolicy, ...]:
    """What is added to calls that leave."""
    return tuple(
        CredentialPolicy(one.host, one.header, _before(one.header, one.prefix), one.env or "", _absolute(folder, one.file))
        for one in written
    )


def record(written: bool | str, folder: Path) -> Path | None:
    """The folder in which calls are kept for `meshlib suggest`."""
    return _absolute(folder, ".meshlib/traffic" if written is True else written) if written else None


def _absolute(folder: Path, written: Any) -> Path | None:
    return None if written is None else (folder / str(written)).absolute()
