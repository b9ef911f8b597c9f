"""How does a gRPC call come into the mesh?

    observe > secure > admit > route > handle

Two parts that work with any server of grpcio, by its public API alone: interceptors, which take each call through the inbound way
before the application's handler runs, and `add_port`, which opens a port with our certificate, whose rotation each new connection
sees. Put our interceptor first: those before it run for callers who are not allowed.

A method's name is exact and never normalised: what isn't `/package.Service/Method` is UNIMPLEMENTED before anything looks at it. Who
may call what is decided before a request message is parsed, and before it is told whether a method exists. The health service and
reflection are methods like others: open them by a rule.

Limits of what grpcio offers: metadata can't be taken out, so a handler must not believe any that speaks of identity. Connections that
exist are not closed when what their peer proved ceases to hold (its certificate ends or is revoked, a root leaves the bundle): their
calls are those of a caller without identity from then on, but for streams that were let in before (give the server
`grpc.max_connection_age_ms` and `grpc.max_connection_age_grace_ms` where that matters). And who resumes a TLS session shows an earlier
certificate, which is judged like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from meshlib import errors

from ..listeners import HANDED
from .handlers import MeshInterceptor, MeshSyncInterceptor
from .visit import reception_of

__all__ = ["MeshInterceptor", "MeshSyncInterceptor", "add_port", "server_interceptors", "sync_server_interceptors"]


def server_interceptors(mesh: Any) -> Sequence[grpc.aio.ServerInterceptor[Any, Any]]:
    """For `grpc.aio.server(interceptors=...)`."""
    return [MeshInterceptor(reception_of(mesh))]


def sync_server_interceptors(mesh: Any) -> Sequence[grpc.ServerInterceptor[Any, Any]]:
    """For `grpc.server(interceptors=...)`."""
    return [MeshSyncInterceptor(reception_of(mesh))]


def add_port(mesh: Any, server: Any, address: str, *, plain: str | None = None) -> int:
    """Open a port of a grpc server (aio or blocking) as the service's mode has it, and return its number.

    observe: plain text. enforce: mutual TLS; who shows no certificate of our trust domain gets no connection. permissive: the same at
    `address`, for callers of the mesh, and plain text at `plain` for the others: gRPC can't serve both on one port, nor ask for a
    certificate without requiring it. The rules judge both, and in mode permissive refuse neither.

    The server is the mesh's to end from then on: by `mesh.drain()`, and with the process (`end.py`).

    A port that another gRPC server holds is shared with it, as gRPC does by default: for an error instead, give both servers the
    option ("grpc.so_reuseport", 0). Raises ListenError, IdentityError or ConfigError.
    """
    mode, handed = mesh.config.own.mode, mesh.config.own.inbound.agent
    if plain is not None and mode != "permissive":
        raise errors.ConfigError(
            f"a plain gRPC port ({plain}) beside the one with mutual TLS is for mode permissive; this service's mode is {mode}.",
            hint="Leave `plain` out, or set secure.mode: permissive while callers join the mesh.",
        )
    if mode == "observe" or (address.startswith("unix:") and handed):
        # What the node agent hands over comes in plain, and with its word for who calls.
        port = _listen(server.add_insecure_port, address)
        if handed and address in {f"unix:{handed}", f"unix://{handed}"}:
            Path(handed).chmod(HANDED)
    else:
        port = _listen(server.add_secure_port, address, _credentials(mesh))
    if plain is not None:
        _listen(server.add_insecure_port, plain)
    from .end import ends_with

    ends_with(mesh, server)
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
    from ...secure import certificates

    key = certificates.new_key()
    root = certificates.new_root(key, "withdrawn.invalid", 3600.0, time.time())
    pem = certificates.pem(root)
    return grpc.ssl_server_certificate_configuration([(certificates.key_pem(key), pem)], root_certificates=pem)


def _configuration(identity: Any) -> Any:
    if not identity.bundles.get(identity.trust_domain):
        raise errors.TrustDomainError(
            f"our bundle holds no root of our own trust domain {identity.trust_domain!r}.",
            hint="Issue the identity anew: meshlib ca issue",
        )
    # All that we believe, ours and those of other trust domains; which root may vouch for whom is judged for each chain (`peer.py`).
    roots = b"\n".join(bytes(bundle) for bundle in identity.bundles.values())
    return grpc.ssl_server_certificate_configuration([(bytes(identity.key), bytes(identity.chain))], root_certificates=roots)


def _identity_of(mesh: Any) -> Any:
    current = mesh.identity.current if mesh.identity is not None else None
    if current is None:
        raise errors.IdentityError(
            f"the service {mesh.service!r} has no certificate to listen with.",
            hint="Its certificate was never loaded: see the log, and `secure.identity` in mesh.yaml.",
        )
    return current


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
