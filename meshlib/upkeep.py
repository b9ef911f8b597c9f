"""What does the keeper do for a mesh, and from when to when?

From `start` to `stop` it looks at the configuration and at the files of the identity, does what a drain, the engine and the record of
calls need done now and then, and enters the process in its registry while it serves. The parts of a mesh that have work of their own
(trust, discovery, active checks, the node agent) bring their jobs along, also those that a later configuration adds.

It decides nothing: each job is a call of the part that it belongs to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from . import errors
from .reload import LOOK

if TYPE_CHECKING:
    from .config import Config
    from .mesh import Mesh
    from .observe.traffic import Recorder
    from .reload import Reload

log = logging.getLogger("meshlib.mesh")

# At the files of the identity we look twice as often as at those of the configuration, so that trust that was withdrawn is gone within a
# second.
TRUST_LOOK: Final = LOOK / 2
# Seconds between two lines in the record of calls.
WRITE: Final = 5.0


class Upkeep:
    """The keeper's work for one mesh in one process.

    `is_ready`: nobody has asked it to drain. `listen` is where the process listens, if not where the configuration says, and `has_grpc`
    whether it serves gRPC by a port of ours.
    """

    def __init__(self, mesh: Mesh, reload: Reload) -> None:
        self._mesh = mesh
        self._reload = reload
        self._lock = threading.Lock()
        self._started_in: int | None = None
        self._listener: Any = None
        self._jobs: list[Any] = []
        self._registering: Any = None  # that one of them which enters us in a registry
        self._leaves = False
        self._recorder = _recorder_of(mesh.config)
        self.is_ready = True
        self.listen = ""
        self.has_grpc = False
        self._has_grpc_address = False

    def serves(self, listen: str, *, is_grpc: bool = False) -> None:
        """A server of this process listens there. What the node agent hands over came to where the configuration says."""
        handed = self._mesh.config.own.inbound.agent
        self.listen = "" if handed and listen in {f"unix:{handed}", f"unix://{handed}"} else listen
        self.has_grpc, self._has_grpc_address = self.has_grpc or is_grpc, is_grpc

    @property
    def is_started(self) -> bool:
        return self._started_in is not None

    @property
    def metrics_port(self) -> int | None:
        return self._listener.port if self._listener is not None else None

    # --- life

    def start(self) -> None:
        """Begin, or, in a forked child, go on. Harmless where it is under way."""
        mesh = self._mesh
        with self._lock:
            if self._started_in == os.getpid():
                return
            is_forked = self.is_started
            self._started_in = os.getpid()
            self.is_ready = True
        if not is_forked:
            # In a forked child they are still the keeper's; only its thread stayed with the parent.
            every = mesh.keeper.every
            self._registering = every(LOOK, self._register, name="register", first=0.0)
            self._jobs = [
                self._registering,
                every(LOOK, self._reload.look, name="reload"),
                every(TRUST_LOOK, mesh.trust.look, name="rotate"),
                every(LOOK, self._look_at_connections, name="sweep"),
                every(LOOK, self._tend, name="tend"),
                every(LOOK, self._drain, name="drain"),
                every(LOOK, self._watch, name="watch"),
                every(WRITE, self.record, name="record"),
            ]
            self.follow()
            self._add(mesh.directory.jobs())
            mesh.trust.tell_missing()
        mesh.keeper.start()
        address = os.environ.get("MESHLIB_METRICS") or mesh.config.own.observe.metrics
        if address:
            self._serve_metrics(address)

    def follow(self) -> None:
        """Take up the work of those parts that the configuration in force has brought."""
        mesh = self._mesh
        if self.is_started:
            parts = (mesh.trust, mesh.outbound.delegation, mesh.handed, mesh.checker)
            self._add(job for part in parts if part is not None for job in part.jobs())

    def _add(self, jobs: Iterable[Any]) -> None:
        self._jobs += [job for job in jobs if job not in self._jobs]

    def stop(self) -> None:
        """End it all, the entry in a registry first; `start` may follow."""
        mesh = self._mesh
        with self._lock:
            registering, self._registering = self._registering, None
        if registering is not None:
            # First: while the entry is taken out it would make another one.
            registering.cancel()
            is_entering = mesh.config.own.register is not None and mesh.keeper.is_running
            if is_entering or mesh.registrar.instance is not None:
                from .discover.registration import LEAVE

                with contextlib.suppress(TimeoutError):
                    mesh.keeper.run(mesh.registrar.leave()).result(LEAVE)
        with self._lock:
            for job in self._jobs:
                job.cancel()
            self._jobs = []
            self._started_in = None
            if self._listener is not None:
                self._listener.stop()
                self._listener = None
        self._reload.rest()
        mesh.trust.rest()
        self.record()

    def after_fork(self) -> None:
        self._listener = None
        self._lock = threading.Lock()
        # A gRPC server stays with the parent. A listener that `serve` has opened is there for its workers, who know it by this.
        if self._has_grpc_address:
            self.listen = ""
        self.has_grpc = self._has_grpc_address = False

    def _serve_metrics(self, address: str) -> None:
        from .observe.exporter import MetricsListener

        mesh = self._mesh
        listener = MetricsListener(
            address, mesh.metrics, is_ready=lambda: mesh.is_ready, status=lambda: mesh.watch.status(time.monotonic())
        )
        try:
            listener.start(mesh.keeper)
        except errors.ListenError as error:
            # Workers of one service share the address, and the first has it: no reason to serve less than the first.
            log.error("the metrics of process %d are not served: %s", os.getpid(), error)
            return
        self._listener = listener

    # --- what is done now and then

    async def _register(self) -> None:
        """While this process serves, it is entered in the registry that its service names."""
        from .discover import instance_of
        from .server.drain import drain_of

        mesh = self._mesh
        own, drain = mesh.config.own, drain_of(mesh)
        if own.register is None:
            await mesh.registrar.leave()
        elif drain.is_serving and (self.has_grpc or any(not way.is_asleep for way in tuple(mesh.ways))):
            if not self._leaves:
                self._leaves = True
                drain.on_leave(mesh.registrar.leave)
            try:
                instance = instance_of(
                    own.name,
                    self.listen or own.listen or "",
                    address=own.register.address,
                    zone=mesh.config.zone,
                    protocol=own.protocol,
                    settings=own.register.settings,
                )
            except errors.ConfigError as error:
                # What the configuration alone can't say: the port, or a way out of this host, may come about.
                mesh.registrar.refused(own.register.registry, error)
                return
            await mesh.registrar.keep(instance, own.register.registry, own.register.settings)

    def _tend(self) -> None:
        self._mesh.engine.tend(time.monotonic())

    def _drain(self) -> None:
        """Where no server of ours ticks: `drain` was called behind another one."""
        from .server.drain import drain_of

        drain_of(self._mesh).look()

    def _watch(self) -> None:
        self._mesh.watch.look(time.monotonic())

    def _look_at_connections(self) -> None:
        for carrier in tuple(self._mesh.outbound.carriers):
            carrier.sweep()

    def record(self) -> None:
        """Write down the calls that came since the last time, if they are recorded."""
        if self._recorder is not None:
            calls, lost = self._mesh.gate.traffic()
            self._recorder.take(calls, lost, self._mesh.config.own.mode)
            self._recorder.flush()

    def record_by(self, fresh: Config) -> None:
        """Calls are recorded from now on as `fresh` says; those before it as they were to be."""
        before = self._mesh.config
        if (fresh.record, fresh.jwt) != (before.record, before.jwt):
            self.record()
            self._recorder = _recorder_of(fresh)


def _recorder_of(config: Config) -> Recorder | None:
    if config.record is None:
        return None
    from .observe.traffic import Recorder

    return Recorder(config.record, config.service, issuers=tuple(provider.issuer for provider in config.jwt.values()))
