"""How does a gRPC call come into the mesh?

    observe > secure > admit > route > handle

Two parts that work with any server of grpcio, by its public API alone: interceptors, which take each call through the inbound way
before the application's handler runs, and `add_port`, which opens a port with our certificate, whose rotation each new connection
sees. Put our interceptor first: those before it run for callers who are not allowed.

A method's name is exact and never normalised: what isn't `/package.Service/Method` is UNIMPLEMENTED before anything looks at it. Who
may call what is decided before a request message is parsed, and before it is told whether a method exists. The health service and
reflection are methods like others: open them by a rule.

Limits of what grpcio offers: metadata can't be taken out, so a handler must not believe any that speaks of identity; connections
that exist are not closed when a root leaves the bundle (give the server `grpc.max_connection_age_ms`); its ports trust the roots of
our own trust domain only, since grpcio can't tell which root belongs to which domain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio

from meshlib import errors
from meshlib._native import core

from .grpc_handlers import MeshInterceptor, MeshSyncInterceptor, Reception
from .way import InboundWay

# Chains of peers whose judgement is remembered, for as long as our own identity is the same.
CHAINS_KEPT: Final = 1024

__all__ = ["MeshInterceptor", "MeshSyncInterceptor", "add_port", "server_interceptors", "sync_server_interceptors"]


def server_interceptors(mesh: Any) -> Sequence[grpc.aio.ServerInterceptor[Any, Any]]:
    """For `grpc.aio.server(interceptors=...)`."""
    return [MeshInterceptor(_reception_of(mesh))]


def sync_server_interceptors(mesh: Any) -> Sequence[grpc.ServerInterceptor[Any, Any]]:
    """For `grpc.server(interceptors=...)`."""
    return [MeshSyncInterceptor(_reception_of(mesh))]


def add_port(mesh: Any, server: Any, address: str, *, plain: str | None = None) -> int:
    """Open a port of a grpc server (aio or blocking) as the service's mode has it, and return its number.

    observe: plain text. enforce: mutual TLS; who shows no certificate of our trust domain gets no connection. permissive: the same at
    `address`, for callers of the mesh, and plain text at `plain` for the others: gRPC can't serve both on one port, nor ask for a
    certificate without requiring it. The rules judge both, and in mode permissive refuse neither.

    A port that another gRPC server holds is shared with it, as gRPC does by default: for an error instead, give both servers the
    option ("grpc.so_reuseport", 0). Raises ListenError, IdentityError or ConfigError.
    """
    mode = mesh.config.own.mode
    if plain is not None and mode != "permissive":
        raise errors.ConfigError(
            f"a plain gRPC port ({plain}) beside the one with mutual TLS is for mode permissive; this service's mode is {mode}.",
            hint="Leave `plain` out, or set secure.mode: permissive while callers join the mesh.",
        )
    if mode == "observe":
        return _listen(server.add_insecure_port, address)
    port = _listen(server.add_secure_port, address, _credentials(mesh))
    if plain is not None:
        _listen(server.add_insecure_port, plain)
    return port


def _credentials(mesh: Any) -> grpc.ServerCredentials:
    """Credentials that follow our identity: gRPC asks for news at each new connection, in a thread of its own."""
    shown = _identity_of(mesh)

    def news() -> Any:
        nonlocal shown
        current = mesh.identity.current if mesh.identity is not None else None
        if current is shown:
            return None
        made = _configuration(current) if current is not None else _nobody()
        shown = current
        return made

    return grpc.dynamic_ssl_server_credentials(_configuration(shown), news, require_client_authentication=True)


def _nobody() -> Any:
    """After our identity was withdrawn: a certificate that no peer knows, and a root that has signed for none of them."""
    from ..secure import certificates

    key = certificates.new_key()
    root = certificates.new_root(key, "withdrawn.invalid", 3600.0, time.time())
    pem = certificates.pem(root)
    return grpc.ssl_server_certificate_configuration([(certificates.key_pem(key), pem)], root_certificates=pem)


def _configuration(identity: Any) -> Any:
    bundle = identity.bundles.get(identity.trust_domain)
    if not bundle:
        raise errors.TrustDomainError(
            f"our bundle holds no root of our own trust domain {identity.trust_domain!r}.",
            hint="Issue the identity anew: meshlib ca issue",
        )
    return grpc.ssl_server_certificate_configuration(
        [(bytes(identity.key), bytes(identity.chain))], root_certificates=bytes(bundle)
    )


def _identity_of(mesh: Any) -> Any:
    current = mesh.identity.current if mesh.identity is not None else None
    if current is None:
        raise errors.IdentityError(
            f"the service {mesh.service!r} has no certificate to listen with.",
            hint="Its certificate was never loaded: see the log, and `secure.identity` in mesh.yaml.",
        )
    return current


def _reception_of(mesh: Any) -> Reception:
    way = InboundWay(mesh.gate, mesh.observer, trust=mesh.trust)
    return Reception(way, _trust_domain_of(mesh), is_revoked=_revocation_of(mesh))


def _revocation_of(mesh: Any) -> Callable[[bytes], bool]:
    """Is a certificate of this chain (PEM, the leaf first) revoked by a list of ours? gRPC itself looks at no list."""
    seen: Any = None
    known: dict[bytes, bool] = {}

    def is_revoked(chain: bytes) -> bool:
        nonlocal seen
        current = mesh.identity.current if mesh.identity is not None else None
        if current is None or not current.crls:
            return False
        if seen is not current or len(known) >= CHAINS_KEPT:
            known.clear()
            seen = current
        found = known.get(chain)
        if found is None:
            found = known[chain] = not _is_believed(chain, current)
        return found

    return is_revoked


def _is_believed(chain: bytes, identity: Any) -> bool:
    """By the very function that judges the handshakes which are ours."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        certificates = [found.public_bytes(Encoding.DER) for found in x509.load_pem_x509_certificates(chain)]
        core.verify_chain(certificates, identity.bundles, "", time.time(), "clients", identity.crls)
    except (ValueError, errors.MeshError):
        return False
    return True


def _trust_domain_of(mesh: Any) -> Callable[[], str]:
    def trust_domain() -> str:
        current = mesh.identity.current if mesh.identity is not None else None
        return "" if current is None else str(current.trust_domain)

    return trust_domain


def _listen(add: Callable[..., int], address: str, *credentials: Any) -> int:
    try:
        port = add(address, *credentials)
    except RuntimeError as error:
        raise _unheard(address) from error
    if port == 0:
        raise _unheard(address)
    return port


def _unheard(address: str) -> errors.ListenError:
    return errors.ListenError(
        f"gRPC can't listen on {address}.",
        hint="Does another process hold the port, and is the address one of this machine? See gRPC's log line above.",
    )
