"""Over which gRPC channel does an attempt go, and is it still the right one?

gRPC's Python API has no balancer of its own to plug in, no client certificate that rotates and no check of a URI SAN. So there is a
channel to each endpoint (a Link), made at the first attempt and replaced when our identity has a new generation or when it failed
to connect (gRPC's own back-off would make the breaker's probe fail without trying). A Link that was replaced gets no new calls and
is closed when its last call ends.

mTLS goes one of two ways. By DNS name: gRPC's own TLS shows our SVID, trusts only the bundle of the peer's own trust domain, and demands
the DNS SAN `<service>.<namespace>.<trust domain>`, which our CA writes beside the SPIFFE ID. What that leaves open: whoever can make
that CA (or another one in the same bundle) sign a certificate with this DNS name and another SPIFFE ID would be believed; and gRPC
reads no list of what was revoked. By SPIFFE ID: our own TLS behind a relay, which costs a copy more and leaves open what
nest.py says. Without a word in the configuration (`secure.peer_check`), the first way is for identities of our own trust domain
whose DNS name is known, if our CA writes such names; everything else goes by the second.

Channels belong to the process, and those of asyncio to the event loop, that made them: elsewhere there is a clear error instead of
a hang. This file doesn't decide where an attempt goes; the engine does.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from cryptography import x509

from meshlib import errors
from meshlib._native import core
from meshlib.secure import certificates

from ..delegated import directions, is_here
from ..delegated_agent import GONE
from ..way import OutboundWay
from . import relay_thread as threads
from .relay import Relay

if TYPE_CHECKING:
    from ..delegated import Delegation

Options = Sequence[tuple[str, Any]]
READY = grpc.ChannelConnectivity.READY
DOWN = grpc.ChannelConnectivity.TRANSIENT_FAILURE

# Multicallables kept per link; callers that make new serialisers for each call must not fill the memory.
METHODS_KEPT = 256
# How long a blocking caller waits to learn how a failed channel stands. It is answered at once; the limit is for a stalled machine.
STATE_PATIENCE = 0.5
# Seconds that a link is kept without a call: so those to endpoints that are gone end, and callers of every minute keep theirs.
IDLE = 300.0
# How much longer than the relay gRPC waits for a connection: the relay's end of the time comes first, since it can say why.
RELAY_PATIENCE = 0.25
# Of links by the node agent: seconds to connect; and milliseconds between two pings of a connection with calls, and for the answer. So
# calls under way at an agent that hangs come to an end. Longer than the watch's, since it ends all of them, and few can be repeated.
AGENT_PATIENCE: Final = 0.25
AGENT_PING: Final = 500
AGENT_SILENCE: Final = 1000

_process = os.getpid()
# Whether this process has opened a channel; and of a forked one the parent, if that had: its gRPC is of no use here then. gRPC's threads
# stay behind, and whether a new channel works without them, hangs or crashes is a matter of luck, also where the parent closed its own.
_has_opened = False
_busy_parent = 0


def _after_fork() -> None:
    global _process, _busy_parent, _has_opened
    _busy_parent = _process if _has_opened else _busy_parent
    _has_opened = False
    _process = os.getpid()


os.register_at_fork(after_in_child=_after_fork)


class Link:
    """The channel to one endpoint, with one generation of our identity. State of the Endpoint, per process (and event loop)."""

    __slots__ = ("calls", "channel", "directions", "idle_since", "is_down", "is_left", "methods", "own", "place", "relay")

    def __init__(self, channel: Any, own: Any, relay: Relay | None = None) -> None:
        # Where it leads, as the engine names it; and what the node agent has to be told, if it leads there.
        self.place: tuple[str, str] = "", ""
        self.directions: tuple[tuple[str, str], ...] = ()
        self.channel = channel
        self.own = own  # the generation of our Identity that it shows, None in plain text
        self.relay = relay  # behind which our own TLS is, None where gRPC's is used
        # One for each call; a list that threads share without a lock.
        self.calls: deque[None] = deque()
        self.idle_since: float | None = None  # as the keeper saw it; None since it was used last
        self.is_down = False  # it failed to connect; stays so, since it is replaced then
        self.is_left = False  # replaced: closed when the last call ends
        self.methods: dict[Any, Any] = {}

    @property
    def error(self) -> errors.AttemptFailed | None:
        """Why the last connection failed, where that is known better than gRPC tells it."""
        return None if self.relay is None else self.relay.error


class PeerNames(dict[str, str]):
    """What the configuration knows about checking a service: the DNS SANs of identities that don't tell it, and by which way.

    `check` is auto, dns or spiffe; `has_own_ca` is False where somebody else issues the certificates.
    """

    check = "auto"
    has_own_ca = True


def peer_names(config: Any, service: str) -> PeerNames:
    """Of a service, by a `meshlib.config.Config`."""
    names = PeerNames()
    source = config.identity_source
    names.has_own_ca = source is None or source.kind != "plugin"
    known = config.services.get(service)
    if known is not None:
        names.check = known.peer_check
        if core.parse_spiffe_id(known.identity)[0] == config.trust_domain:
            # Our CA writes a service's name, whatever its identity looks like; another trust domain's may not.
            names[known.identity] = f"{service}.{config.secure.namespace}.{config.trust_domain}"
    return names


class Links:
    """All links of one mesh channel. The two kinds below know asyncio's and the blocking API."""

    def __init__(
        self, service: str, outbound: OutboundWay, options: Options = (), names: Mapping[str, str] | None = None
    ) -> None:
        self.service = service
        self.is_closed = False
        self._outbound = outbound
        self._names = names if isinstance(names, PeerNames) else PeerNames(names or {})
        self._options = tuple(options)
        # By endpoint and identity, and the agent's socket where they lead by it.
        self._links: dict[tuple[str, ...], Link] = {}
        # Those that were replaced and have calls.
        self._left: set[Link] = set()
        # Blocking calls whose answer has not begun, and which their caller gave no end.
        self.waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._credentials: dict[str, tuple[Any, Any]] = {}
        # Whether the certificate of this generation of ours has a DNS SAN, so that those of its neighbours will, too.
        self._named: tuple[Any, bool] = (None, False)
        # Taken again by a call that the garbage collector finds while it is held.
        self._lock = threading.RLock()
        self._process = 0
        outbound.carriers.add(self)

    @property
    def delegation(self) -> Delegation | None:
        """Who carries the calls of this service, where that is the node agent."""
        delegation = self._outbound.delegation
        return delegation if delegation is not None and self.service in delegation.services else None

    def take(self, address: str, identity: str, connect_timeout: float, *, is_own: bool = False) -> Link:
        """The link to an endpoint, counted as in use until `give`. An empty identity means plain text, by configuration.

        It leads by the node agent where the service is delegated, unless that one is away or `is_own` says otherwise.
        """
        self.check_home()
        if self._outbound.delegation is not None and not is_own:
            found = self._take_agents(address, identity, connect_timeout)
            if found is not None:
                return found
        store = self._outbound.identity
        current = store.current if identity and store is not None else None
        if identity and current is None:
            raise errors.IdentityError(
                f"the call to {self.service!r} needs mutual TLS, but this process has no identity.",
                hint="Its certificate was never loaded: see the log, and `secure.identity` in mesh.yaml.",
            )
        key = (address, identity)
        while True:
            link = self._links.get(key)
            if link is None or link.own is not current or link.is_down or (link.relay is not None and link.relay.is_spent):
                link = self._renew(key, link, current, connect_timeout)
            link.calls.append(None)
            link.idle_since = None
            if not link.is_left:
                return link
            self.give(link)  # it was replaced at this very moment

    def _take_agents(self, address: str, identity: str, connect_timeout: float) -> Link | None:
        """The same by the node agent; None where the service isn't delegated, or the agent can't carry it."""
        delegation = self.delegation
        if delegation is None or is_here(address):
            return None
        reason = delegation.reach(self._outbound.clock())
        if reason:
            delegation.fell_back(reason)
            return None
        key = (address, identity, delegation.agent.address)
        while True:
            link = self._links.get(key)
            if link is None or link.is_down:
                if delegation.is_gone():
                    delegation.fell_back(GONE)
                    return None
                link = self._renew(key, link, None, connect_timeout)
            link.calls.append(None)
            link.idle_since = None
            if not link.is_left:
                delegation.sent()
                return link
            self.give(link)

    def _renew(self, key: tuple[str, ...], seen: Link | None, current: Any, connect_timeout: float) -> Link:
        """A link in the place of one that won't do."""
        with self._lock:
            link = self._links.get(key)
            if link is not None and link is not seen:
                return link  # another thread was quicker
            fresh = self._links[key] = self._make(*key, current, connect_timeout)
            if link is None:
                return fresh
            # In this order: who takes it now sees that it is left, or is seen here.
            link.is_left = True
            is_idle = not link.calls
            if not is_idle:
                self._left.add(link)
        if is_idle:
            self._shut(link)
        else:
            self._leave(link)
        return fresh

    def sweep(self) -> None:
        """What waits too long: links that nobody uses, such as those to endpoints that are gone, and answers that don't begin. The keeper
        calls it, once a second.
        """
        if self.is_closed or self._process != _process:
            return
        now = self._outbound.clock()
        for key, link in tuple(self._links.items()):
            if link.calls:
                link.idle_since = None
            elif link.idle_since is None:
                link.idle_since = now
            elif now - link.idle_since >= IDLE:
                self._drop(key, link)
        try:
            waiting = tuple(self.waiting)
        except RuntimeError:
            return  # a thread begins a call at this very moment: in a second again
        for call in waiting:
            call.look(now)

    def _drop(self, key: tuple[str, ...], link: Link) -> None:
        with self._lock:
            if self._links.get(key) is not link:
                return
            del self._links[key]
            link.is_left = True
            is_idle = not link.calls
            if not is_idle:
                self._left.add(link)
        if is_idle:
            self._shut(link)
        else:
            self._leave(link)

    def give(self, link: Link) -> None:
        """A call on this link is over."""
        if self._process == _process:  # otherwise forked: the channels are the parent's
            link.calls.pop()
            if link.is_left:
                self._leave(link)

    def _leave(self, link: Link) -> None:
        """Close a link that was replaced, once, with its last call."""
        with self._lock:
            is_last = not link.calls and link in self._left
            if is_last:
                self._left.discard(link)
        if is_last:
            self._shut(link)

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
            if _busy_parent:
                raise errors.MeshError(
                    f"process {_process} is a child of {_busy_parent}, which used gRPC before the fork: a channel to {self.service!r} may "
                    "hang here.",
                    hint="Make the first call after it, in the worker, or start the process anew (multiprocessing's spawn).",
                    reason="grpc.forked",
                )
            self._process = _process

    def _make_agents(self, address: str, identity: str, socket: str, connect_timeout: float) -> Link:
        options = [
            ("grpc.default_authority", self.service),
            *self._channel_options(AGENT_PATIENCE),
            ("grpc.keepalive_time_ms", AGENT_PING),
            ("grpc.keepalive_timeout_ms", AGENT_SILENCE),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.ping_timeout_ms", AGENT_SILENCE),
        ]
        link = Link(self._open(socket, None, options), None)
        assert self.delegation is not None
        told = directions(address, identity, self.delegation.identity, is_http2=True, connect=connect_timeout)
        link.place = address, identity
        link.directions = tuple((name.decode(), value.decode()) for name, value in told)
        return link

    def _make(self, address: str, identity: str, *rest: Any) -> Link:
        global _has_opened
        _has_opened = True
        if len(rest) == 3:
            return self._make_agents(address, identity, rest[0], rest[2])
        current, connect_timeout = rest
        if identity and self._is_relayed(identity, current):
            return self._make_relayed(address, identity, current, connect_timeout)
        options = self._channel_options(connect_timeout)
        if not identity:
            return Link(self._open(address, None, options), None)
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
        return Link(self._open(address, credentials, [*options, ("grpc.ssl_target_name_override", name)]), current)

    def _make_relayed(self, address: str, identity: str, current: Any, connect_timeout: float) -> Link:
        tls = self._outbound.identity.client_tls
        if tls is None:
            raise errors.IdentityError(
                f"the call to {self.service!r} needs mutual TLS, and the identity of this process was withdrawn.",
                hint="See the log for who took it back, and why.",
            )
        relay = self._open_relay(tls, identity, address, connect_timeout)
        try:
            # To the server the call is one to the service, not to a socket; who has said otherwise is heard.
            options = [("grpc.default_authority", self.service), *self._channel_options(connect_timeout + RELAY_PATIENCE)]
            return Link(self._open(relay.target, None, options), current, relay)
        except BaseException:
            self._close_relay(relay, is_waiting=False)
            raise

    def _is_relayed(self, identity: str, current: Any) -> bool:
        """Is the SPIFFE ID to be checked by us, since no DNS name would prove it?"""
        if self._names.check != "auto":
            return self._names.check == "spiffe"
        trust_domain, _ = core.parse_spiffe_id(identity)
        if not self._names.has_own_ca or trust_domain != current.trust_domain or not has_dns_name(identity, self._names):
            return True
        if self._named[0] is not current:
            self._named = current, is_named(current)
        return not self._named[1]

    def _channel_options(self, connect_timeout: float) -> list[tuple[str, Any]]:
        # The last one of a name counts.
        return [
            *self._options,
            ("grpc.enable_retries", 0),  # one layer retries: the core
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.use_local_subchannel_pool", 1),  # a new link is a new connection, never one of an older identity
            ("grpc.enable_http_proxy", 0),  # an address of discover is where to go
            ("grpc.min_reconnect_backoff_ms", max(1, round(connect_timeout * 1000))),  # gRPC's name for the time to connect
        ]

    def __del__(self) -> None:
        # Dropped without a word: gRPC closes its channels then, and the relays follow.
        if self._process == _process:
            for link in self._links.values():
                if link.relay is not None:
                    with suppress(Exception):  # the interpreter may be on its way out
                        self._close_relay(link.relay, is_waiting=False)

    def _drop_all(self) -> list[Link]:
        self.is_closed = True
        with self._lock:
            links = [*self._links.values(), *self._left]
            self._links, self._left = {}, set()
        return links

    def _open(self, address: str, credentials: Any, options: Options) -> Any:
        raise NotImplementedError

    def _open_relay(self, tls: core.TlsClient, identity: str, address: str, connect_timeout: float) -> Relay:
        raise NotImplementedError

    def _close_relay(self, relay: Relay, *, is_waiting: bool) -> None:
        raise NotImplementedError

    def _shut(self, link: Link) -> None:
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
        loop = asyncio.get_running_loop()
        if self._loop is loop and self._process == _process and not self.is_closed:
            return  # as nearly always
        super().check_home()
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
        await asyncio.gather(*(_end(link, grace) for link in links), *self._closing)

    def _open(self, address: str, credentials: Any, options: Options) -> grpc.aio.Channel:
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=options)

    def _open_relay(self, tls: core.TlsClient, identity: str, address: str, connect_timeout: float) -> Relay:
        assert self._loop is not None  # `take` has seen to it
        relay = Relay(self._loop, tls, identity, address, connect_timeout)
        relay.start()
        return relay

    def _close_relay(self, relay: Relay, *, is_waiting: bool) -> None:
        relay.close_soon()

    def _shut(self, link: Link) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return  # gRPC closes what nobody holds
        try:
            is_here = asyncio.get_running_loop() is loop
        except RuntimeError:
            is_here = False
        if is_here:
            self._close_soon(loop, link)
        else:  # the garbage collector may find the last call in any thread
            loop.call_soon_threadsafe(self._close_soon, loop, link)

    def _close_soon(self, loop: asyncio.AbstractEventLoop, link: Link) -> None:
        task = loop.create_task(_end(link, None))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _state(self, channel: grpc.aio.Channel) -> grpc.ChannelConnectivity:
        return channel.get_state()


class SyncLinks(Links):
    """Links for blocking callers, used by any thread."""

    def close(self) -> None:
        for link in self._drop_all():
            self._end(link, is_waiting=True)

    def _open(self, address: str, credentials: Any, options: Options) -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(address, options=options)
        return grpc.secure_channel(address, credentials, options=options)

    def _open_relay(self, tls: core.TlsClient, identity: str, address: str, connect_timeout: float) -> Relay:
        return threads.relay_thread.open(tls, identity, address, connect_timeout)

    def _close_relay(self, relay: Relay, *, is_waiting: bool) -> None:
        threads.relay_thread.close(relay, is_waiting=is_waiting)

    def _shut(self, link: Link) -> None:
        # Maybe a callback of gRPC's found the last call, and the channel waits for the very thread that runs callbacks.
        threading.Thread(target=self._end, args=(link,), name="meshlib-grpc-close", daemon=True).start()

    def _end(self, link: Link, *, is_waiting: bool = False) -> None:
        link.channel.close()
        if link.relay is not None:
            self._close_relay(link.relay, is_waiting=is_waiting)

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


async def _end(link: Link, grace: float | None) -> None:
    await link.channel.close(grace)
    if link.relay is not None:
        await link.relay.close()


def is_named(own: Any) -> bool:
    """Whether a certificate of ours has a DNS name of its own trust domain, as our CA writes one."""
    names = certificates.dns_names_of(x509.load_pem_x509_certificate(own.chain))
    return any(name.endswith(f".{own.trust_domain}") for name in names)


def has_dns_name(identity: str, names: Mapping[str, str]) -> bool:
    try:
        dns_name(identity, names)
    except errors.IdentityError:
        return False
    return True


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
        f"a gRPC channel can't check the identity {identity!r} by a DNS name.",
        hint="Our CA writes one for spiffe://<trust domain>/ns/<namespace>/sa/<service>, and for the identity of a service in "
        "mesh.yaml. Set secure.peer_check of the service to auto or spiffe: then the SPIFFE ID is checked.",
    )
