"""What does a process hold of the mesh?

One `Mesh`: the configuration, who we are, the two engines, and what feeds them. It hands out clients and middleware, and nothing
else hangs on globals. Loading it does all that can fail at once and loudly (configuration, certificates, static endpoints),
so that a request never has to wait for it later; the keeper's thread starts with the first client or server, not at import. It takes
no decision about a call: the engines do.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from . import errors
from ._native import core
from .call import deadline
from .client.way import OutboundWay
from .reload import Reload, remember, tell
from .upkeep import Upkeep

if TYPE_CHECKING:
    import grpc
    import grpc.aio
    from httpx import AsyncBaseTransport, AsyncClient, BaseTransport, Client
    from pybreaker import CircuitBreakerListener

    from .admit.checks import Checker
    from .admit.inbound import InboundRates
    from .admit.limiter import Stores
    from .client.delegated import Delegation
    from .client.function import Decorator
    from .client.guarded import Guard
    from .config import Config
    from .observe.edges import Alert
    from .secure import IdentityStore
    from .server.handed import Handed
    from .server.way import InboundWay

log = logging.getLogger("meshlib.mesh")

F = TypeVar("F", bound=Callable[..., Any])


class Mesh:
    """The mesh as one process sees it. Make it with `Mesh.load`; it is safe to share between threads and event loops.

    Attributes: `config` (what is in force), `service` (who we are), `engine` and `gate` (the decisions, out and in), `trust` (who is
    believed to be who) with `identity` (our certificate, None in mode observe without one), `observer` (traces and metrics), `watch`
    (who calls whom, how privately, and what alarms), `reloads` and `reload_failures`.
    """

    def __init__(self, config: Config) -> None:
        from .keeper import shared
        from .observe import Observer, redact
        from .observe.edges import Watch
        from .secure.trust import Trust
        from .server.waiting import Room

        redact.guard()
        # What it is made of is imported here, not in the outage in which it is raised first.
        _ = errors.CircuitOpen
        self.config = config
        self.service = config.service
        self.keeper = shared()
        self._reload = Reload(lambda: self.config, self._adopt)
        self.upkeep = Upkeep(self, self._reload)
        # Those whose entrance is made again, after a fork or a reload.
        self.guards: weakref.WeakSet[Guard] = weakref.WeakSet()
        # The ways in that were made for applications of this process, and the rates that all processes count for them together.
        self.ways: weakref.WeakSet[InboundWay] = weakref.WeakSet()
        self.inbound_rates: InboundRates | None = None
        self._stores: Stores | None = None
        # What goes by the agent of this node, and what comes in by it; None where nothing does.
        self.delegation: Delegation | None = None
        self.handed: Handed | None = None
        now = time.monotonic()
        self.engine = core.Engine(secrets.randbits(64))
        self.gate = core.Gate()
        self.room = Room(self.gate, time.monotonic)
        self.trust = Trust(config, self.gate, self.keeper)
        self.engine.publish(config.client_plan(), now)
        self.gate.publish(config.server_plan(), now)
        self.observer = Observer(service=config.service, sample=config.own.observe.sample)
        self.outbound = OutboundWay(self.engine, self.trust.identity, self.observer)
        from .discover import Directory, Registrar

        self._use(config)
        self._limit(config)()
        self.directory = Directory(self.engine, self.keeper)
        self.registrar = Registrar(self.keeper, self.directory.registries)
        self.directory.follow(config)
        self.checker: Checker | None = None
        self._check(config)
        self.watch = Watch(self)
        remember(config)
        tell(config)
        _meshes.add(self)

    @classmethod
    def load(cls, source: str | os.PathLike[str] | None = None, *, service: str | None = None, zone: str | None = None) -> Mesh:
        """Read the configuration, prove who we are, and find the endpoints that can be found at once.

        `source` is a file, or the URL of a configuration in a registry (`meshlib.config.source`), by default $MESHLIB_CONFIG and
        then ./mesh.yaml; `service` says which of its services this process is,
        by default $MESHLIB_SERVICE; `zone` says where it runs, by default $MESHLIB_ZONE, and "" is nowhere in particular.
        Raises `ConfigError` with every mistake at once, or `IdentityError`.
        """
        from .config import load

        return cls(load(source, service=service, zone=zone))

    # --- life

    def start(self) -> Mesh:
        """Start the keeper's work: rotation, discovery, reload, metrics. Called by whatever needs it; harmless to call again."""
        self.upkeep.start()
        return self

    def reload(self) -> bool:
        """Take the configuration again if its file changed; True if a new one is in force.

        What can't be used changes nothing: the old configuration keeps serving, and the error is raised (and counted).
        """
        return self._reload.now()

    @property
    def reloads(self) -> int:
        """Configurations taken into use after the first."""
        return self._reload.taken

    @property
    def reload_failures(self) -> int:
        """Configurations that could not be used."""
        return self._reload.failures

    def drain(self) -> None:
        """Take no new work: readiness goes false, registries are told, and servers of the mesh end when what is under way has ended."""
        from .server.drain import drain_of

        self.upkeep.is_ready = False
        drain_of(self).begin()

    @property
    def is_ready(self) -> bool:
        """Does this process take new work? False from the moment on in which it begins to end."""
        from .server.drain import drain_of

        return self.upkeep.is_ready and drain_of(self).is_serving

    def on_drain(self, callback: Callable[[], object]) -> None:
        """Call back, in the keeper's thread, when the process begins to end and still serves: the time to leave registries.

        At most 5 s are waited for all callbacks together.
        """
        from .server.drain import drain_of

        drain_of(self).on_leave(callback)

    def close(self) -> None:
        """End the keeper's work for this mesh. Clients made by it close their own connections."""
        self.upkeep.stop()

    @property
    def metrics_port(self) -> int | None:
        """The port at which the metrics are, if they are."""
        return self.upkeep.metrics_port

    def metrics(self) -> str:
        """Everything that is counted, as Prometheus text."""
        return self.observer.prometheus(self)

    @property
    def identity(self) -> IdentityStore | None:
        """Our certificate and the roots that we trust, as they are now; None in mode observe without one."""
        return self.trust.identity

    def on_alert(self, callback: Callable[[Alert], object]) -> None:
        """Call back, in the keeper's thread, when an edge loses mTLS, a caller comes that was never seen, or a certificate is overdue."""
        self.watch.alerts.add(callback)

    # --- out

    deadline = staticmethod(deadline)

    def client(self, *, httpx: ModuleType | None = None, **options: Any) -> AsyncClient:
        """An `httpx.AsyncClient` whose hosts may be services: ``await http.get("http://orders/items/7")``.

        `options` are httpx's own. The mesh's deadline is in force unless a `timeout` is given. `verify`, `cert`, `proxy`, `limits`,
        `trust_env` and `http1` are about hosts outside the mesh, `http2` about both. `mounts` take calls from the mesh where they
        match, and a `transport` of your own takes all, as httpx documents. With ``httpx=httpx2`` it is a client of that module.
        """
        from .client.http import faces, httpx_of, laid_out

        module = httpx_of(httpx)
        made: AsyncClient
        if options.get("transport") is not None:
            made = module.AsyncClient(**options)
        else:
            network, rest = laid_out(options)
            made = faces(module).AsyncClient(self.outbound, self.transport(httpx=module, **network), **rest)
        return made

    def sync_client(self, *, httpx: ModuleType | None = None, **options: Any) -> Client:
        """The same as an `httpx.Client`, for threads."""
        from .client.http import faces, httpx_of, laid_out

        module = httpx_of(httpx)
        made: Client
        if options.get("transport") is not None:
            made = module.Client(**options)
        else:
            network, rest = laid_out(options)
            made = faces(module).Client(self.outbound, self.sync_transport(httpx=module, **network), **rest)
        return made

    def transport(self, *, httpx: ModuleType | None = None, **network: Any) -> AsyncBaseTransport:
        """The mesh as a transport, for an `httpx.AsyncClient` of your own; `network` as `client` takes it."""
        from .client.http import faces, httpx_of

        self.start()
        made: AsyncBaseTransport = faces(httpx_of(httpx)).AsyncTransport(self.outbound, **network)
        return made

    def sync_transport(self, *, httpx: ModuleType | None = None, **network: Any) -> BaseTransport:
        """The mesh as a transport, for an `httpx.Client` of your own."""
        from .client.http import faces, httpx_of

        self.start()
        made: BaseTransport = faces(httpx_of(httpx)).Transport(self.outbound, **network)
        return made

    def confirm(self, service: str) -> bool:
        """Believe what a registry or DNS says of a service, though it takes away more than half of its endpoints.

        Without that it is held back for five minutes (`meshlib_discover_held`); False if nothing is.
        """
        return self.directory.confirm(service)

    def service_of(self, host: str) -> str | None:
        """The Service that the host of a URL names; None for a host outside the mesh."""
        return self.engine.service_of(host)

    def leave(self, host: str) -> None:
        """What stands in for httpx asks before it calls a host outside the mesh, which is then counted.

        Raises `UnknownService` for a bare name, and `Denied` where `egress: deny` is configured.
        """
        from .client.egress import leave

        leave(self.outbound, host)

    def leaving(
        self, scheme: str, host: str, headers: Iterable[tuple[str, str]], *, is_verified: bool = True
    ) -> list[tuple[str, str]]:
        """What `leave` does, and the headers with which the call leaves: without the mesh's own, with the credential of its host.

        `is_verified`: TLS proves that the other side is this host. Raises `Refused` where a credential can't be had.
        """
        from .client.egress import departure

        return departure(self.outbound, scheme, host, headers, is_verified=is_verified)

    def grpc_channel(
        self, service: str, *, idempotent: Iterable[str] = (), options: Sequence[tuple[str, Any]] = ()
    ) -> grpc.aio.Channel:
        """A `grpc.aio.Channel` to a service; generated stubs work unchanged.

        `idempotent` names methods that may be repeated after they may have been processed: "/pkg.Service/Method", "/pkg.Service/*".
        `options` are gRPC's channel arguments, such as message sizes; those that are the mesh's (retries, balancing, TLS) it keeps.
        """
        from .client.grpc import open_channel

        return open_channel(self.start(), service, idempotent=idempotent, options=options)

    def sync_grpc_channel(
        self, service: str, *, idempotent: Iterable[str] = (), options: Sequence[tuple[str, Any]] = ()
    ) -> grpc.Channel:
        """The same as a `grpc.Channel`, for threads."""
        from .client.grpc import open_sync_channel

        return open_sync_channel(self.start(), service, idempotent=idempotent, options=options)

    def grpc_client_interceptors(self, service: str) -> Sequence[grpc.aio.ClientInterceptor]:
        """Interceptors for a `grpc.aio` channel of your own: deadline, trace, limits and metrics, without balancing."""
        from .client.grpc import client_interceptors

        return client_interceptors(self.start(), service)

    def sync_grpc_client_interceptors(self, service: str) -> Sequence[Any]:
        """The same for `grpc.intercept_channel` and a `grpc.Channel` of your own."""
        from .client.grpc import sync_client_interceptors

        return sync_client_interceptors(self.start(), service)

    def guard(
        self,
        name: str,
        *,
        idempotent: bool = False,
        timeout: float | None = None,
        retries: int | None = None,
        wait: Callable[[Any], float] | None = None,
        stop: Callable[[Any], bool] | None = None,
        retry_on: type[Exception] | tuple[type[Exception], ...] = (Exception,),
        ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
        fallback: Any = ...,
        listeners: Iterable[CircuitBreakerListener] = (),
    ) -> Decorator:
        """Limits, breaker, deadline and retries for any function, sync or async: ``@mesh.guard("ledger", idempotent=True)``.

        Functions of one `name` share a breaker, a limit and a budget. Only an `idempotent` function is ever repeated, at most
        `retries` times (in place of what is configured), after exceptions of `retry_on`. Every `Exception` counts against the
        dependency, but for those of `ignore`, which say nothing about it. `timeout` is for the whole call, in seconds: an async
        function is cut then; a blocking one can't be, so that it only ends what is between attempts, and calls of the mesh
        inside it. `wait`, `stop` and `fallback` are as in `CallPolicy`; `listeners` are pybreaker's.

        Raises what the function raised at last, unchanged; `CircuitOpen` (also a `pybreaker.CircuitBreakerError`),
        `LimitExceeded` or `RateLimited` before it is called at all; `DeadlineExceeded`. `meshlib.call_of(error)` has the record.
        """
        from .client.function import guard

        return guard(
            self,
            name,
            idempotent=idempotent,
            timeout=timeout,
            retries=retries,
            wait=wait,
            stop=stop,
            retry_on=retry_on,
            ignore=ignore,
            fallback=fallback,
            listeners=listeners,
        )

    @property
    def fallbacks(self) -> Mapping[tuple[str, str], int]:
        """How often a fallback stood in, by service (or ``guard:<name>``) and word: `value`, `last_good` or `callable`."""
        from .client.stand_in import fallbacks_of

        return fallbacks_of(self.outbound).counts()

    # --- in

    def authorizer(self, name: str, *, timeout: float = 0.5) -> Callable[[F], F]:
        """Decorate the function that decides for the custom rules which name it: ``@mesh.authorizer("opening-hours")``.

        It is given a `meshlib.Inquiry`, and only True lets a call in; anything else, an exception, or no answer within `timeout`
        seconds denies it. An async function is awaited on the loop that serves the call, a plain one runs on one of eight threads.
        """
        return self.trust.authorizers.register(name, timeout)

    def asgi(self, app: Any) -> Any:
        """An ASGI application behind the mesh's inbound way."""
        from .server.asgi import MeshASGI
        from .server.door import way_into

        return MeshASGI(app, way_into(self))

    def wsgi(self, app: Any) -> Any:
        """A WSGI application behind the mesh's inbound way."""
        from .server.door import way_into
        from .server.wsgi import MeshWSGI

        return MeshWSGI(app, way_into(self))

    def serve(self, app: Any, *, listen: str | None = None, port: int | None = None, workers: int = 1, threads: int = 8) -> None:
        """Serve an ASGI or WSGI application until it is told to stop, with the service's own certificate.

        `listen` is "host:port", by default the service's `listen` in mesh.yaml; `port` alone listens on all interfaces.
        Raises `ListenError`.
        """
        from .server.serve import serve

        if listen is None and port is not None:
            listen = f"0.0.0.0:{port}"
        serve(self, app, listen=listen, workers=workers, threads=threads)

    def grpc_server_interceptors(self) -> Sequence[grpc.aio.ServerInterceptor[Any, Any]]:
        """Interceptors for a `grpc.aio.server`: identity, authorisation, deadline, limits, metrics."""
        from .server.grpc import server_interceptors

        return server_interceptors(self.start())

    def sync_grpc_server_interceptors(self) -> Sequence[grpc.ServerInterceptor[Any, Any]]:
        """The same for a `grpc.server`."""
        from .server.grpc import sync_server_interceptors

        return sync_server_interceptors(self.start())

    def add_grpc_port(self, server: Any, address: str, *, plain: str | None = None) -> int:
        """Listen on an address with the service's own certificate, which rotates by itself; returns the port.

        The server ends with the process: after `drain()` it takes no new calls, and those under way have their grace.
        """
        from .server.grpc import add_port

        port = add_port(self.start(), server, address, plain=plain)
        self.upkeep.serves(address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}", is_grpc=True)
        return port

    def add_grpc_health(self, server: Any, *names: str) -> None:
        """Answer gRPC's health checks: SERVING until the process begins to end. `names` are known beside "" and the service's own."""
        from .server.grpc.health import add_health

        add_health(self.start(), server, names)

    async def serve_grpc(self, server: grpc.aio.Server) -> None:
        """Start a `grpc.aio` server and serve until the process is told to end; for processes that serve nothing else.

        It drains as `serve` does, and comes back then. Raises `ListenError`.
        """
        from .server.grpc.end import serve

        await serve(self, server)

    def sync_serve_grpc(self, server: grpc.Server) -> None:
        """The same for a `grpc.server`, in the main thread."""
        from .server.grpc.end import serve_blocking

        serve_blocking(self, server)

    # --- a configuration comes into force

    def _adopt(self, fresh: Config) -> None:
        """Everything of a new configuration, or nothing: what can fail comes first."""
        now = time.monotonic()
        client_plan, server_plan = fresh.client_plan(), fresh.server_plan()
        core.Engine(0).publish(client_plan, now)
        core.Gate().publish(server_plan, now)
        go_through_with_it = self.directory.prepare(fresh)
        limit = self._limit(fresh)
        # The last that can fail: what it opens, only its own end would close.
        trust = self.trust.prepare(fresh)
        # Keys go to the gate before the plan that needs them.
        trust()
        self.engine.publish(client_plan, now)
        self.gate.publish(server_plan, now)
        self.outbound.identity = self.trust.identity
        self.upkeep.record_by(fresh)
        self._use(fresh)
        limit()
        before, after = self.config.own, fresh.own
        self.config = fresh
        if (before.listen, before.inbound.public, before.inbound.probe) != (
            after.listen,
            after.inbound.public,
            after.inbound.probe,
        ):
            log.warning(
                "where services.%s listens has changed in %s: that takes effect with a restart", self.service, fresh.label
            )
        # There may be more places than before.
        self.room.call(self.gate.called())
        self._renew_guards()
        go_through_with_it()
        self._check(fresh)
        self.upkeep.follow()

    def _use(self, config: Config) -> None:
        """What the way out has to know of a configuration beside the engine's plan."""
        from .client.egress import EgressRules

        self.observer.use(config)
        self.outbound.egress = EgressRules.of(config)
        self.outbound.is_by_peer = any(service.is_by_peer for service in config.services.values())
        self._delegate(config)

    def _delegate(self, config: Config) -> None:
        """What goes and comes by the agent of this node, if anything does."""
        if config.agent is not None and self.delegation is None:
            from .client.delegated import Delegation

            self.delegation = Delegation(self.keeper, self.outbound.ledger)
        delegation, handed = self.delegation, self.handed
        if delegation is not None:
            delegation.follow(config)
            if config.own.inbound.agent and handed is None:
                from .server.handed import Handed

                handed = Handed(self.keeper, delegation.watch.ask)
                handed.on_proved = lambda address, peer: self.watch.proved(address, peer)  # noqa: PLW0108  made later
        self.outbound.delegation = delegation if delegation is not None and delegation.services else None
        self.handed = handed if config.own.inbound.agent else None
        for way in tuple(self.ways):
            way.agent = self.handed

    def _check(self, config: Config) -> None:
        """Ask endpoints how they are, where a configuration wants that."""
        if self.checker is None:
            if all(service.check is None for service in config.services.values()):
                return
            from .admit.checks import Checker

            self.checker = Checker(
                self.engine,
                self.keeper,
                endpoints=self.directory.endpoints,
                own=lambda: self.identity.client_tls if self.identity is not None else None,
                is_called=lambda service: self.engine.calls(service) > 0,
            )
        self.checker.follow(config)

    def _limit(self, config: Config) -> Callable[[], None]:
        """Open the stores of rates that all processes share, if there are any; what is returned puts them in force."""
        goes_out, comes_in = any(service.global_rates for service in config.services.values()), config.own.inbound_global_rates
        if goes_out or comes_in:
            from .admit.inbound import InboundRates
            from .admit.limiter import RateGuard, Stores

            if self._stores is None:
                self._stores = Stores()
        # Without any there is nobody to ask, also where there was before: calls take the short way again.
        out = (self.outbound.rates or RateGuard(self._stores)) if goes_out else None
        inbound = (self.inbound_rates or InboundRates(self._stores)) if comes_in else None
        changes = [rates.prepare(config) for rates in (out, inbound) if rates is not None]

        def put_in_force() -> None:
            for change in changes:
                change()
            self.outbound.rates = out
            self.inbound_rates = inbound
            for way in tuple(self.ways):
                way.rates = inbound

        return put_in_force

    def _after_fork(self) -> None:
        self.outbound.wake = self._wake
        self._renew_guards()
        # The parent's choices are not repeated, and its permits and TLS sessions are not ours.
        self.engine.reseed(secrets.randbits(64))
        self.gate.reset()
        self.outbound.ledger.forget()
        self.upkeep.after_fork()
        self._reload.after_fork()
        self.trust.after_fork()
        if self.delegation is not None:
            self.delegation.after_fork()
        if self.handed is not None:
            self.handed.after_fork()

    def _renew_guards(self) -> None:
        for guard in tuple(self.guards):
            guard.renew()

    def _wake(self) -> None:
        """In a forked child: the keeper's thread stayed with the parent."""
        self.outbound.wake = None
        if self.upkeep.is_started:
            self.start()

    def __repr__(self) -> str:
        serial = self.identity.current.serial if self.identity is not None and self.identity.current is not None else None
        return f"<Mesh {self.config.name} service={self.service} mode={self.config.own.mode} certificate={serial}>"


# Those of this process; a mesh that nobody holds any more is not kept alive for the sake of a fork.
_meshes: weakref.WeakSet[Mesh] = weakref.WeakSet()


# Engines that a fork is holding: the same are let go, whatever is made or collected meanwhile.
_held: list[core.Engine] = []


def _before_fork() -> None:
    # A change that another thread is making would stay half made in the child for ever.
    _held.extend(mesh.engine for mesh in tuple(_meshes))
    for engine in _held:
        engine.hold()


def _let_go() -> None:
    while _held:
        _held.pop().release()


def _after_fork() -> None:
    _let_go()
    for mesh in tuple(_meshes):
        mesh._after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_let_go, after_in_child=_after_fork)
