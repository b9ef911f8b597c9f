"""Which headers about identity does the handler get after all?

Nearly never any: they are taken out before anything else happens (`way.frozen`). Where a call comes from (X-Forwarded-For and its
kin) may be told by the proxies that `secure.proxies` names, by address or identity; where the rules don't bind yet, by everybody, so that
an application behind a proxy goes on as it did. Where the configuration says so, three things more change.
A proxy with an identity that it names (`secure.proxies.identities`) may say what it found out about a call: the client's certificate,
the original path. With `xfcc: sanitize_set` the handler is told who this connection's peer is, in Envoy's form. And a token that
was for the mesh is taken out, as in Istio, unless the provider says `forward: true`.

An address is no identity: a proxy known by its address only is believed about addresses, and about nothing else.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

from .._native import core
from ..call import Peer

Headers = list[tuple[bytes, bytes]]

XFCC: Final = b"x-forwarded-client-cert"
# Where a call comes from.
_PLACE: Final = frozenset(
    {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-proto", b"x-real-ip"}
)
# What a trusted proxy may tell. Never the mesh's own, and never a name that another spelling could stand for.
_TOLD: Final = (b"x-forwarded-", b"x-envoy-", b"x-original-", b"x-b3-")


def handed(entry: core.Entry, peer: Peer, headers: Headers, kept: Headers) -> Headers:
    """`kept`, the headers that everybody's handler gets, with what the policy adds or takes out for this one."""
    token = entry.token_header.encode()
    answer = [pair for pair in kept if pair[0].lower() != token] if token else list(kept)
    present = {name for name, _ in kept}
    if entry.is_believed:
        answer += [pair for pair in headers if pair[0] in _PLACE]
        present |= _PLACE
    is_trusted = entry.is_from_proxy
    if is_trusted:
        answer += [pair for pair in headers if pair[0] not in present and _is_told(pair[0])]
    mode = entry.xfcc
    if mode == "append_forward" and is_trusted:
        told = [value for name, value in headers if name == XFCC]
        answer.append((XFCC, b",".join([*told, _element(entry.identity, peer)])))
    elif mode == "sanitize_set" and peer.spiffe_id:
        answer.append((XFCC, _element(entry.identity, peer)))
    return answer


def _is_told(name: bytes) -> bool:
    return name.startswith(_TOLD) and name != XFCC and b"_" not in name


@lru_cache(maxsize=512)
def _element(own: str, peer: Peer) -> bytes:
    """One hop of x-forwarded-client-cert, as Envoy writes it. Nothing in it needs quotes: IDs have neither commas nor semicolons."""
    digest = f"Hash={hashlib.sha256(peer.chain[0]).hexdigest()};" if peer.chain else ""
    return f"By={own};{digest}URI={peer.spiffe_id}".encode()
