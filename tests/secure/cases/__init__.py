"""Who turns a case of which area into the real thing, and what came of it?

One adapter for each area. `answer` hands a case to its adapter; what is waiting for a part that is not built yet raises `Waits`, and what
nobody understands raises `NotUnderstood`.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.secure.cases import (
    agent,
    bundles,
    burdens,
    calls,
    heads,
    identities,
    key_files,
    keys,
    limits,
    logs,
    paths,
    sessions,
    settings,
    tokens,
    wires,
)
from tests.secure.cases.case import Answer, Case, NotUnderstood, Waits, agrees, is_exact, is_one_of, not_understood

__all__ = ["ADAPTERS", "Answer", "Case", "NotUnderstood", "Waits", "agrees", "answer", "is_exact", "is_one_of"]

ADAPTERS: dict[str, Callable[[Case], Answer]] = {
    "path_authz": paths.path_authz,
    "istio_profile": paths.istio_profile,
    "escaped_slash_action": paths.escaped_slash_action,
    "app_view": paths.app_view,
    "grpc_path": paths.grpc_path,
    "host_authz": heads.host_authz,
    "method": heads.method,
    "header_authz": heads.header_authz,
    "header_spoof": heads.header_spoof,
    "trace_ctx": heads.trace_ctx,
    "jwt": tokens.jwt,
    "spiffe_id": identities.spiffe_id,
    "spiffe_match": identities.spiffe_match,
    "x509_svid": identities.x509_svid,
    "bundle": bundles.bundle,
    "tls_session": sessions.tls_session,
    "smuggling": wires.smuggling,
    "dos": burdens.dos,
    "retry_safety": calls.retry_safety,
    "rate_limit": limits.rate_limit,
    "redos": limits.redos,
    "jwks": keys.jwks,
    "log_leak": logs.log_leak,
    "config_injection": settings.config_injection,
    "key_files": key_files.key_files,
    "uds_attestation": agent.uds_attestation,
    "workload_api": agent.workload_api,
}


def answer(case: Case) -> Answer:
    """What the real thing does with this case."""
    adapter = ADAPTERS.get(case.area)
    if adapter is None:
        raise not_understood(case)
    return adapter(case)
