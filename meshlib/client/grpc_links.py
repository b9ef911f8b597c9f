"""Over which gRPC channel does an attempt go, and is it still the right one?

gRPC's Python API has no balancer of its own to plug in, no client certificate that rotates and no check of a URI SAN. So there is a
channel to each endpoint (a Link), made at the first attempt and replaced when our identity has a new generation or when it failed
to connect (gRPC's own back-off would make the breaker's probe fail without trying). A Link that was replaced gets no new calls and
is closed when its last call ends.

mTLS: the channel shows our SVID, trusts only the bundle of the peer's own trust domain, and demands the DNS SAN
`<service>.<namespace>.<trust domain>`, which our CA writes beside the SPIFFE ID. What it leaves open: whoever can make that CA (or
another one in the same bundle) sign a certificate with this DNS name and another SPIFFE ID would be believed. An identity for
which no DNS name is known is refused.

Channels belong to the process, and those of asyncio to the event loop, that made them: elsewhere there is a clear error instead of
a hang. This file doesn't decide where an attempt goes; the engine does.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from meshlib import errors
from meshlib._native import core

from .way import OutboundWay

Options = Sequence[tuple[str, Any]]
READY = grpc.ChannelConnectivity.READY
DOWN = grpc.ChannelConnectivity.TRANSIENT_FAILURE

# Multicallables kept per link; callers that make new serialisers for each call must not fill the memory.
METHODS_KEPT = 256
# How long a blocking caller waits to learn how a failed channel stands. It is answered at once; the limit is for a stalled machine.
STATE_PATIENCE = 0.5


_process = os.getpid()


def _after_fork() -> None:
    global _process
    _process = os.getpid()


os.register_at_fork(after_in_child=_after_fork)


class Link:
    """The channel to one endpoint, with one generation of our identity. State of the Endpoint, per process (and event loop)."""

    __slots__ = ("calls", "channel", "is_down", "is_left", "methods", "own")

    def __init__(self, channel: Any, own: Any) -> None:
        self.channel = channel
        self.own = own  # the generation of our Identity that it shows, None in plain text
        self.calls = 0
        self.is_down = False  # it failed to connect; stays so, since it is replaced then
        self.is_left = False  # replaced: closed when the last call ends
        self.methods: dict[Any, Any] = {}


class Links:
    """All links of one mesh channel. The two kinds below know asyncio's and the blocking API."""

    def __init__(
        self, service: str, outbound: OutboundWay, options: Options = (), names: Mapping[str, str] | None = None
    ) -> None:
        self.service = service
        self.is_closed = False
        self._outbound = outbound
        self._names = dict(names or {})
        self._options = tuple(options)
        self._links: dict[tuple[str, str], Link] = {}
        self._credentials: dict[str, tuple[Any, Any]] = {}
        # Taken again by a call that the garbage collector finds while it is held.
        self._lock = threading.RLock()
        self._process = 0

    def take(self, address: str, identity: str, connect_timeout: float) -> Link:
        """The link to an endpoint, counted as in use until `give`. An empty identity means plain text, by configuration."""
        self.check_home()
        store = self._outbound.identity
        current = store.current if identity and store is not None else None
        if identity and current is None:
            raise errors.IdentityError(
                f"the call to {self.service!r} needs mutual TLS, but this process has no identity.",
                hint="Its certificate was never loaded: see the log, and `secure.identity` in mesh.yaml.",
            )
        key = (address, identity)
        old = None
        with self._lock:
            link = self._links.get(key)
            if link is None or link.own is not current or link.is_down:
                fresh = Link(self._make(address, identity, current, connect_timeout), current)
                if link is not None:
                    link.is_left = True
                    old = link if link.calls == 0 else None
                link = self._links[key] = fresh
            link.calls += 1
        if old is not None:
            self._shut(old.channel)
        return link

    def give(self, link: Link) -> None:
        """A call on this link is over."""
        if self._process != _process:
            return  # forked: the channels are the parent's
        with self._lock:
            link.calls -= 1
            is_last = link.is_left and link.calls == 0
        if is_last:
            self._shut(link.channel)

    def standing(self, link: Link) -> tuple[bool, bool]:
        """Right after a failure: is the link connected, and does it fail to connect? Remembers the second."""
        if link.is_down:
            return False, True
        state = self._state(link.channel)
        link.is_down = state is DOWN
        return state is READY, link.is_down

    def check_home(self) -> None:
        """Raise if this is not the process that made the channels."""
        if self.is_closed:
            raise grpc.aio.UsageError(f"the channel to {self.service!r} is closed.")
        if self._process != _process:
            if self._process:
                raise errors.MeshError(
                    f"the gRPC channel to {self.service!r} was used in process {self._process}, and now in its child {_process}.",
                    hint="gRPC doesn't survive a fork: make the channel after it (in the worker), never at import.",
                    reason="grpc.forked",
                )
            self._process = _process

    def _make(self, address: str, identity: str, current: Any, connect_timeout: float) -> Any:
        # The last one of a name counts.
        options = [
            *self._options,
            ("grpc.enable_retries", 0),  # one layer retries: the core
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.use_local_subchannel_pool", 1),  # a new link is a new connection, never one of an older identity
            ("grpc.enable_http_proxy", 0),  # an address of discover is where to go
            ("grpc.min_reconnect_backoff_ms", max(1, round(connect_timeout * 1000))),  # gRPC's name for the time to connect
        ]
        if not identity:
            return self._open(address, None, options)
        trust_domain, name = dns_name(identity, self._names)
        own, credentials = self._credentials.get(trust_domain, (None, None))
        if own is not current:
            bundle = current.bundles.get(trust_domain)
            if not bundle:
                raise errors.TrustDomainError(
                    f"there is no trust bundle for {trust_domain!r}, to which {self.service!r} at {address} belongs.",
                    hint="Put the CA certificates of that trust domain into the bundle, or correct the service's identity.",
                )
            credentials = grpc.ssl_channel_credentials(bytes(bundle), bytes(current.key), bytes(current.chain))
            self._credentials[trust_domain] = current, credentials
        return self._open(address, credentials, [*options, ("grpc.ssl_target_name_override", name)])

    def _drop_all(self) -> list[Link]:
        self.is_closed = True
        with self._lock:
            links, self._links = list(self._links.values()), {}
        return links

    def _open(self, address: str, credentials: Any, options: Options) -> Any:
        raise NotImplementedError

    def _shut(self, channel: Any) -> None:
        raise NotImplementedError

    def _state(self, channel: Any) -> grpc.ChannelConnectivity:
        raise NotImplementedError


class AioLinks(Links):
    """Links of one event loop: the one that is running when the first call is made."""

    def __init__(
        self, service: str, outbound: OutboundWay, options: Options = (), names: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(service, outbound, options, names)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def check_home(self) -> None:
        super().check_home()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise errors.MeshError(
                    f"the gRPC channel to {self.service!r} belongs to another event loop.",
                    hint="gRPC binds a channel to the loop of its first call: make one for each loop.",
                    reason="grpc.other_loop",
                )
            self._loop = loop

    def states(self) -> list[tuple[Link, grpc.ChannelConnectivity]]:
        """How the channels to the endpoints stand now."""
        return [(link, link.channel.get_state()) for link in self._links.values()]

    async def close(self, grace: float | None) -> None:
        links = self._drop_all()
        await asyncio.gather(*(link.channel.close(grace) for link in links), *self._closing)

    def _open(self, address: str, credentials: Any, options: Options) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    def _shut(self, channel: grpc.aio.Channel) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return  # gRPC closes what nobody holds
        try:
            is_here = asyncio.get_running_loop() is loop
        except RuntimeError:
            is_here = False
        if is_here:
            self._close_soon(loop, channel)
        else:  # the garbage collector may find the last call in any thread
            loop.call_soon_threadsafe(self._close_soon, loop, channel)

    def _close_soon(self, loop: asyncio.AbstractEventLoop, channel: grpc.aio.Channel) -> None:
        task = loop.create_task(channel.close(None))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _state(self, channel: grpc.aio.Channel) -> grpc.ChannelConnectivity:
        return channel.get_state()


class SyncLinks(Links):
    """Links for blocking callers, used by any thread."""

    def close(self) -> None:
        for link in self._drop_all():
            link.channel.close()

    def _open(self, address: str, credentials: Any, options: Options) -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

    def _shut(self, channel: grpc.Channel) -> None:
        channel.close()

    def _state(self, channel: grpc.Channel) -> grpc.ChannelConnectivity:
        # The blocking API tells the state only to subscribers, from a thread of gRPC's that ends soon after. Only failures come here.
        seen: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        tell = seen.put
        channel.subscribe(tell)
        try:
            return seen.get(timeout=STATE_PATIENCE)
        except queue.Empty:
            return READY  # not known: then nothing is proved, and nothing is repeated that must not be
        finally:
            channel.unsubscribe(tell)


def dns_name(identity: str, names: Mapping[str, str]) -> tuple[str, str]:
    """The trust domain of a SPIFFE ID, and the DNS SAN that our CA writes into its certificate.

    `names` has the DNS SANs of identities that don't tell it: those that the configuration gives a service by hand.
    """
    trust_domain, path = core.parse_spiffe_id(identity)
    parts = path.split("/")
    if len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa":
        return trust_domain, f"{parts[4]}.{parts[2]}.{trust_domain}"
    if identity in names:
        return trust_domain, names[identity]
    raise errors.IdentityError(
        f"a gRPC channel can't check the identity {identity!r}.",
        hint="gRPC compares DNS names only. Our CA writes one for spiffe://<trust domain>/ns/<namespace>/sa/<service>, "
        "and for the identity of a service in mesh.yaml.",
    )
