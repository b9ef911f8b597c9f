"""What does a process hold to know who is who?

Four things, each with a life of its own, and one configuration for all of them: our identity and its rotation, the bundles of other
trust domains, the keys of those who issue tokens, and the functions that custom rules ask. `Trust` makes them, hands the keeper their
work, and exchanges them for those of another configuration: what can fail happens in `prepare`, and what is returned by it can't.

It judges nothing: peers are verified on the wire, tokens and rules in the core.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import errors
from .custom import Authorizers

if TYPE_CHECKING:
    from .._native import core
    from ..config import Config
    from ..keeper import Keeper
    from .federation import Federation
    from .identity import IdentityStore
    from .jwks import KeySource, KeyStore

log = logging.getLogger("meshlib.secure")


class Trust:
    """State of the process. `identity` is None in mode observe without one, `federation` and `keys` where none are configured."""

    def __init__(self, config: Config, gate: core.Gate, keeper: Keeper) -> None:
        self.authorizers = Authorizers()
        self.federation: Federation | None = None
        self.keys: KeyStore | None = None
        self.identity: IdentityStore | None = None
        self._gate = gate
        self._keeper = keeper
        self._config = config
        self.prepare(config)()

    def prepare(self, fresh: Config) -> Callable[[], None]:
        """Make what a configuration needs; what is returned puts it in force. Raises ConfigError or IdentityError."""
        sources = tuple(self._key_source(fresh, name) for name in fresh.own.providers)
        if sources:
            from . import jwks

            jwks.check(sources)
        federation = self.federation
        relations = Relations.of(fresh)
        if federation is None and relations.federation:
            from .federation import Federation

            federation = Federation(relations, self._keeper, own=self._own_bundles)
        is_same = self.identity is not None and _same_source(self._config, fresh) and self.federation is federation
        identity = self.identity if is_same else _store_of(fresh, federation)

        def put_in_force() -> None:
            old = self.identity
            if federation is not None:
                federation.follow(relations)
            if self.keys is not None:
                self.keys.update(sources, allowed=_near(fresh))
            elif sources:
                # The gate has its keys from here on: nothing may fail any more.
                from .jwks import KeyStore

                self.keys = KeyStore(sources, self._gate, self._keeper, allowed=_near(fresh))
            self.federation, self.identity, self._config = federation, identity, fresh
            if old is not None and old is not identity:
                old.close()

        return put_in_force

    def jobs(self) -> list[Any]:
        """Start the keeper's work, for those who keep a list of what they have to `cancel`. Harmless to ask again."""
        found: list[Any] = []
        if self.federation is not None:
            found += self.federation.jobs()
        if self.keys is not None:
            found += self.keys.jobs()
        return found

    async def look(self) -> None:
        """Our identity, as it is now."""
        if self.identity is not None:
            await self.identity.look(time.time())

    def tell_missing(self) -> None:
        """Log each authorizer that rules of ours name, and that nobody has registered: its calls are denied."""
        for name in self.authorizers.missing(self._config.authorizers):
            log.error(
                "a custom rule asks the authorizer %r, and nobody has registered it: what it would decide is denied. "
                'Write @mesh.authorizer("%s") on the function that decides; under `meshlib serve` the module has to wrap its '
                "application too (app = mesh.asgi(app)), so that this is the mesh that serves it.",
                name,
                name,
            )

    def rest(self) -> None:
        """Close what is open for it, until the mesh is started again."""
        if self.identity is not None:
            self.identity.rest()

    def after_fork(self) -> None:
        if self.identity is not None:
            self.identity.after_fork()

    def _own_bundles(self) -> Mapping[str, bytes]:
        current = self.identity.current if self.identity is not None else None
        return {} if current is None else {current.trust_domain: current.bundles[current.trust_domain]}

    def _key_source(self, config: Config, name: str) -> KeySource:
        from .jwks import KeySource

        provider = config.jwt[name]
        jwks = provider.jwks
        if jwks.kind == "url":
            return KeySource(name, url=jwks.url, issuer=provider.issuer)
        if jwks.kind == "file":
            return KeySource(name, file=jwks.file, issuer=provider.issuer)
        if jwks.kind == "keys":
            return KeySource(name, keys=json.loads(jwks.keys)["keys"], issuer=provider.issuer)
        return KeySource(name, read=lambda: self._token_keys(provider.issuer), issuer=provider.issuer)

    def _token_keys(self, trust_domain: str) -> bytes | None:
        """The keys for tokens of a trust domain: of its federated bundle, or of what lies beside our own certificate."""
        from . import bundle, files

        if self.federation is not None and (known := self.federation.bundle_of(trust_domain)) is not None:
            return known.jwt
        folder = self._config.identity_folder
        if folder is None or trust_domain != self._config.trust_domain:
            return None
        where = Path(folder, self._config.service)
        with files.folder(where) as fd:
            if (where / "tokens.json").exists():
                return files.read_public(fd, where, "tokens.json")
            if (where / "bundle.json").exists():
                return bundle.parse(files.read_public(fd, where, "bundle.json")).jwt
        return None


@dataclass(frozen=True, slots=True)
class _Relation:
    """One federated trust domain as `federation` asks for it: what isn't written is None."""

    trust_domain: str
    file: Path | None
    url: str | None
    profile: str | None
    spiffe_id: str | None
    every: float | None
    can_be_local: bool

    @classmethod
    def of(cls, policy: Any) -> _Relation:
        if not policy.url:
            return cls(policy.trust_domain, policy.file, None, None, None, None, can_be_local=False)
        return cls(
            policy.trust_domain,
            policy.file,
            policy.url,
            policy.profile or None,
            policy.spiffe_id or None,
            policy.every or None,
            can_be_local=policy.can_be_local,
        )


@dataclass(frozen=True, slots=True)
class Relations:
    """The trust domains that the configuration federates with."""

    trust_domain: str
    federation: tuple[_Relation, ...]

    @classmethod
    def of(cls, config: Config) -> Relations:
        return cls(config.trust_domain, tuple(_Relation.of(policy) for policy in config.federation.values()))


def _near(config: Config) -> frozenset[str]:
    from urllib.parse import urlsplit

    urls = (provider.jwks.url for provider in config.jwt.values() if provider.jwks.can_be_local)
    return frozenset(urlsplit(url).hostname or "" for url in urls)


def _store_of(config: Config, federation: Federation | None) -> IdentityStore | None:
    from .identity import IdentityStore
    from .sources import identity_source_of

    source = identity_source_of(config)
    if source is None:
        return None
    mode = config.own.mode
    store = IdentityStore(source, mode=mode, federation=federation)
    if mode == "observe":
        # Nothing asks for it yet: a service may be configured before its certificate is there.
        try:
            store.refresh(time.time())
        except errors.IdentityError as error:
            log.warning("mode observe goes on without an identity: %s", error)
    else:
        store.require(time.time())
    return store


def _same_source(old: Config, new: Config) -> bool:
    return (old.identity_source, old.own.identity, old.trust_domain, old.own.mode) == (
        new.identity_source,
        new.own.identity,
        new.trust_domain,
        new.own.mode,
    )
