"""Where does our identity come from, by the configuration?

    identity: {folder: …}                      `meshlib ca issue` fills it                        FolderSource
    identity: {files: {certificate: …, …}}     mounted by Kubernetes, cert-manager or Docker      MountedSource
    identity: {ca: https://…, token: …}        enrolled with `meshlib ca serve`, and renewed      EnrolledSource
    identity: {agent: true}                    said by the node agent, over its Workload API        WorkloadSource
    identity: {plugin: spiffe, …}              an installed package, found by its entry point

A plugin is loaded only if the configuration names it, and exactly one package may offer that name: two would leave to chance
who says who we are. Whatever it answers is judged by the store like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..config.plugin import opened
from ..errors import ConfigError
from .identity import IdentitySource

if TYPE_CHECKING:
    from ..config import Config

GROUP: Final = "meshlib.identity"

# What a package offers under its entry point: the settings of `identity:` without `plugin`, our SPIFFE ID and our trust domain.
Factory = Callable[..., IdentitySource]


def identity_source_of(config: Config) -> IdentitySource | None:
    """The source that a configuration names; None if it names none. Raises ConfigError and IdentityError."""
    # Which fields are there goes by the kind: that was seen to when the configuration was read.
    choice: Any = config.identity_source
    if choice is None:
        return None
    service, trust_domain, spiffe_id = config.own.name, config.trust_domain, config.own.identity
    if choice.kind == "folder":
        from .folder import FolderSource

        return FolderSource(choice.folder, service, trust_domain, spiffe_id)
    if choice.kind == "files":
        from .mounted import MountedSource

        return MountedSource(choice.certificate, choice.key, choice.bundle, spiffe_id, crl=choice.crl)
    if choice.kind == "ca":
        from .enrol import EnrolledSource

        return EnrolledSource(choice.ca, choice.state, service, trust_domain, spiffe_id, token=choice.token)
    if choice.kind == "agent":
        from .workload import WorkloadSource, agent_uid

        # It is on this machine, and comes back soon: it is asked each second.
        return WorkloadSource(choice.socket, spiffe_id, uid=agent_uid(), longest=1.0)
    if choice.kind == "plugin":
        return open_plugin(choice.plugin, choice.settings, spiffe_id=spiffe_id, trust_domain=trust_domain)
    raise ConfigError(
        f"secure.identity: {choice.kind!r} is no source of identities.", hint="Use folder, files, ca, agent or plugin."
    )


def open_plugin(name: str, settings: Mapping[str, Any], *, spiffe_id: str, trust_domain: str) -> IdentitySource:
    """The source of a name, by its entry point."""
    source, place = opened(
        GROUP,
        name,
        lambda factory: factory(dict(settings), spiffe_id=spiffe_id, trust_domain=trust_domain),
        at="secure.identity.plugin",
        trusted_with="identity",
    )
    if not callable(getattr(source, "load", None)):
        raise ConfigError(
            f"secure.identity.plugin: {place} makes no source of identities.",
            hint="It must answer an object with load(); meshlib.testing.check_identity_source checks the rest.",
        )
    found: IdentitySource = source
    return found
