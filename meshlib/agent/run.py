"""How does the daemon begin, change and end?

    check     the configuration, who vouches, the state folder, the rights that the entries need, every socket and address. All that
              is wrong is told at once, and nothing is served
    begin     each identity is asked for once; then the sockets accept, and whoever started us is told so
    reload    SIGHUP, or the configuration has changed: entries, federation, addresses, admins. What can't be used changes nothing.
              Sockets, state, workers and who vouches count from the next start, which is said
    end       SIGTERM or SIGINT: nothing new is accepted, streams and connections are told to go elsewhere, what is under way may end
              within `GRACE`; the second signal ends it at once. A socket that systemd has opened stays open: who connects meanwhile
              waits for the next process, which has the same secrets

It starts no process and writes no file but for its state folder and its sockets. Whether the loop still turns is told to systemd's
watchdog, where there is one.

The configuration may be a file, which is looked at each second, or in a registry (etcd://…), which tells by itself. What was in force
last is kept beside the process, as the library does, so that the agent starts while the registry is away; over what is in force that
copy is never taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import random
import resource
import signal
import socket
import stat
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .._native import core
from ..config import Config, examine, load
from ..config.source import ConfigSource, is_url, shown
from ..config.text import parse
from ..errors import ConfigError, IdentityError, ListenError, MeshError, Problem
from ..keeper import apart
from ..reload import RETRY, remember
from ..secure.ca import RENEWED_LIFE
from ..secure.workload.address import AGENT, agent_uid
from . import attest, report, sockets
from .acceptor import Acceptor
from .admin import Admin
from .data import DataPlane, Handover, Proxy, bound, doors_of
from .entries import Entries
from .issue import Issuer
from .strangers import Strangers
from .systemd import ALIVE, READY, STOPPING, Notifier
from .workload import WorkloadApi

if TYPE_CHECKING:
    from ..config.agent_policy import AgentPolicy

log = logging.getLogger("meshlib.agent")

# Seconds for what is under way when the agent ends, and for every identity to be asked for when it begins.
GRACE: Final = 25.0
FIRST: Final = 20.0
# Seconds between two looks at the configuration's file, and at what the data path has to know.
LOOK: Final = 1.0
# Open files that the unit of systemd gives it, too.
DESCRIPTORS: Final = 65_536
# After so many seconds of anything a person is told what it waits for.
SOON: Final = 2.0

# What counts from the next start only.
_FIXED: Final = ("socket", "data", "admin", "state", "workers", "ca", "enrol")
_CAP_SYS_PTRACE: Final = 19

# Of a start that fails: what no other start cures, unless a person does something first. What is taken (a socket, an address) may be free
# the next time.
_LASTING: Final = ("agent.open_file", "agent.rights", sockets.PLACE)

T = TypeVar("T")


def configured(source: str | os.PathLike[str] | None = None, origin: ConfigSource | None = None) -> Config:
    """The configuration as the agent reads it, from a file or a URL (which is `origin`, if it is open already).

    Raises ConfigError with every mistake, and MeshError where a registry can't be asked, which passes by itself.
    """
    try:
        examined = examine(source, origin=origin)
    except ConfigError as error:
        named = source if source is not None else os.environ.get("MESHLIB_CONFIG")
        if is_url(named) and isinstance(error.__context__, OSError):
            raise MeshError(str(error), reason="agent.source") from None
        raise
    node = examined.document.agent
    if node is None:
        raise ConfigError(
            f"{shown(examined.url) or examined.file} has no section agent.",
            hint="Write one, such as agent: {ca: ca, entries: [{service: orders, uid: 1001}]}.",
        )
    # The agent is none of the services: it reads what all of them have in common, with the eyes of one.
    service = node.entries[0].service if node.entries else next(iter(examined.services))
    return load(examined.url or examined.file, service=service, origin=examined.origin)


class Agent:
    """State of the process: the daemon, from `check` to the end of `run`. `life` is that of certificates of an embedded CA."""

    def __init__(
        self,
        config: Config,
        *,
        life: float = RENEWED_LIFE,
        grace: float = GRACE,
        proxy: Callable[[int], Proxy] | None = None,
        say: Callable[[str], None] = log.info,
        notifier: Notifier | None = None,
    ) -> None:
        assert config.agent is not None
        self.config = config
        self.is_draining = False
        self.began = time.monotonic()
        self.reloads = self.reload_failures = 0
        # Why the configuration of now isn't in force, and what of it isn't yet.
        self.fault = self.late = ""
        self._begun_with = config.agent
        self._life = life
        self._grace = grace
        self._make_proxy = proxy
        self._say = say
        self._notifier = notifier or Notifier()
        self._tried = b"" if config.url else _digest(config.file)
        self._retry = 0.0
        self._listening: dict[str, sockets.Listening] = {}
        self._signals = 0
        self._told_to_end = asyncio.Event()
        self._told_at_once = asyncio.Event()
        self._reloading = asyncio.Lock()
        self.acceptors: dict[str, Acceptor] = {}
        self.strangers = Strangers()
        self.issuer: Issuer
        self.data: DataPlane
        self.entries: Entries

    # ------------------------------------------------------------------------------------------------ check

    def check(self) -> None:
        """Make all parts, and open every socket. Raises MeshError with everything that is wrong, and leaves nothing open then.

        It is a ConfigError if any of it is a person's to mend, so that whoever started us doesn't try again and again.
        """
        policy = self.config.agent
        assert policy is not None
        faults: list[Problem] = []
        is_lasting = False

        def tried(key: str, work: Callable[..., T], *details: Any) -> T | None:
            nonlocal is_lasting
            try:
                return work(*details)
            except MeshError as error:
                is_lasting = is_lasting or isinstance(error, ConfigError | IdentityError) or error.reason in _LASTING
                faults.append(Problem(self.source, self._line_of(key), key, error.message, error.hint))
            except OSError as error:
                faults.append(Problem(self.source, self._line_of(key), key, str(error)))
            return None

        who = "agent.ca" if policy.ca is not None else "agent.enrol"
        issuer = tried(who, lambda: Issuer(self.config, life=self._life))
        if issuer is not None:
            tried(who, issuer.check)
        handover = tried("agent.state", Handover, policy.state)
        if not self.config.url:  # who may write to a registry is the registry's to say
            tried("agent.entries", refuse_open, self.config.file)
        tried("agent.entries", refuse_blind, self.config)
        given = tried("LISTEN_FDS", sockets.inherited) or {}
        for name, key, path in (
            ("workload", "socket", policy.socket),
            ("data", "data", policy.data),
            ("admin", "admin", policy.admin),
        ):
            mode = sockets.MODES[name] if name != "admin" else _admin_mode(policy)
            opened = tried(f"agent.{key}", _socket, name, Path(path), mode, given)
            if opened is not None:
                self._listening[name] = opened
        for door in doors_of(self.config):
            found = tried(f"services.{door.name}.listen", bound, door.name, door.address)
            if found is not None:
                found.close()  # it is opened again when there is an identity to show
        if faults:
            for listening in self._listening.values():
                listening.close()
            text = "the agent can't start:\n" + "\n".join(map(str, faults))
            raise ConfigError(text) if is_lasting else MeshError(text, reason="agent.start")
        assert issuer is not None
        assert handover is not None
        self.issuer = issuer
        self.entries = Entries(policy.entries)
        # The last: nothing of it runs before all is right.
        make: Callable[[int], Proxy] = self._make_proxy or core.Proxy
        self.data = DataPlane(make(policy.workers), self.issuer, self.entries, handover, self.strangers)

    @property
    def source(self) -> str:
        """The configuration's file or URL, for people."""
        return shown(self.config.url) if self.config.url else str(self.config.file)

    def _line_of(self, key: str) -> int:
        place = tuple(key.split("."))
        if self.config.url:
            return parse(self.config.fresh.decode("utf-8", "replace"), self.source).line_of(place)
        with contextlib.suppress(MeshError):
            return examine(self.config.file).text.line_of(place)
        return 1

    # ------------------------------------------------------------------------------------------------ serve

    async def run(self) -> bool:
        """Serve until somebody says to end; True if nothing was cut."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._spawn(self.reload(is_asked=True)))
        self._tasks: set[asyncio.Task[Any]] = set()
        api = WorkloadApi(self.entries, self.issuer)
        attestor = attest.Attestor(self.entries.wants_digest)

        async def serve(plug: socket.socket, caller: attest.Caller) -> None:
            if not self.entries.of(caller):
                self.strangers.note("workload", caller)
            await api.serve(plug, caller)

        workload = Acceptor(
            self._listening["workload"].sock,
            attestor,
            serve,
            on_refused=lambda plug: api.serve(plug, None),
            knows=self.entries.knows,
            fits=self.entries.of,
            bars=api.bars,
            name="workload",
        )
        data = Acceptor(self._listening["data"].sock, attestor, self.data.on_caller, knows=self.entries.knows, name="data")
        self.acceptors = {"workload": workload, "data": data}
        assert self.config.agent is not None
        self.admin = Admin(self._listening["admin"].sock, report.view_of(self), self.config.agent.admins)
        try:
            await self.admin.start()
            await self._begin()
            await workload.start()
            await data.start()
            await asyncio.to_thread(remember, self.config)
            for line in report.lines_of(self):
                self._say(line)
            if distrust := distrusted(self.config):
                log.warning("%s", distrust)
            self._notifier.tell(READY, status=self._status())
            self._spawn(self._look_always())
            if self.config.origin is not None:
                self._spawn(self._hear_always(self.config.origin))
            self._spawn(self._live())
            await self._told_to_end.wait()
            return await self._drain(api, workload, data)
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await self.issuer.close()
            await self.admin.close()
            for listening in self._listening.values():
                listening.close()

    def end(self) -> None:
        """Told once, it drains; told twice, it goes."""
        self._signals += 1
        self._told_to_end.set()
        if self._signals > 1:
            self._told_at_once.set()

    async def _begin(self) -> None:
        said = time.monotonic()

        def progress(done: int, of: int) -> None:
            nonlocal said
            if time.monotonic() - said >= SOON:
                said = time.monotonic()
                self._say(f"waiting for identities: {done} of {of}")
                self._notifier.tell(status=f"waiting for identities: {done} of {of}")

        asking = asyncio.ensure_future(self.issuer.start(FIRST, progress))
        ending = asyncio.ensure_future(self._told_to_end.wait())
        await asyncio.wait({asking, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        elif (error := asking.exception()) is not None:
            raise error
        for about, message in self.issuer.alarms:
            log.warning("%s%s", f"{about}: " if about else "", message)
        self.data.follow(self.config)
        self.issuer.watch(self.data.look)

    async def _drain(self, api: WorkloadApi, workload: Acceptor, data: Acceptor) -> bool:
        self.is_draining = True
        self._notifier.tell(STOPPING, status="draining")
        end = time.monotonic() + self._grace
        log.info("the agent ends: what is under way has %g s", self._grace)
        # A call that waits in a queue that nobody reads would be reset at our end, and its caller could not know that it was not sent.
        queue = self._listening["data"]
        queue.refuse()
        await data.close(1.0, with_queue=not queue.is_inherited)  # who has connected is handed on before the data path closes
        self.data.drain()
        gone = asyncio.ensure_future(self._told_at_once.wait())
        closing = asyncio.ensure_future(workload.close(min(SOON, self._grace)))
        await asyncio.sleep(0)  # it accepts no more
        await api.drain()
        # On a thread that may be left behind: a second signal doesn't wait for it.
        stopping = asyncio.ensure_future(apart(lambda: self.data.proxy.stop(self._grace), "meshlib-stop"))
        try:
            while not stopping.done() and not gone.done():
                await asyncio.wait({stopping, gone}, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
                if not stopping.done() and not gone.done():
                    count = len(self.data.proxy.connections())
                    self._say(f"waiting for {count} connections, {max(0.0, end - time.monotonic()):.0f} s at most")
            if not gone.done():
                await asyncio.wait({closing, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            closing.cancel()
            await asyncio.gather(closing, gone, return_exceptions=True)
        is_whole = stopping.done() and not stopping.cancelled() and stopping.exception() is None and stopping.result()
        if not is_whole:
            log.warning("connections of the data path were cut")
        return is_whole

    # ------------------------------------------------------------------------------------------------ meanwhile

    async def reload(self, *, is_asked: bool = False) -> bool:
        """Take over the configuration as it is now; what can't be used changes nothing, and is told.

        `is_asked`: by a person, who hears also what the log has said before.
        """
        async with self._reloading:
            self._notifier.reloading()
            config = self.config
            if not config.url:
                self._tried = _digest(config.file)
            try:
                fresh = await asyncio.to_thread(configured, config.url or config.file, config.origin)
                if fresh.url and not fresh.fresh:
                    # The copy beside us may be older than what is in force.
                    raise MeshError(f"{self.source} can't be read now.", reason="agent.source")
                self._adopt(fresh)
            except Exception as error:
                self.reload_failures += 1
                self._retry = time.monotonic() + RETRY
                told, self.fault = self.fault, str(error) or type(error).__name__
                is_ours = isinstance(error, MeshError)
                if is_asked or not is_ours or told != self.fault:
                    log.error("the configuration can't be used, and the last good one stays: %s", error, exc_info=not is_ours)
                return False
            finally:
                self._notifier.tell(READY, status=self._status())
            self.reloads += 1
            self.fault = ""
            log.info("configuration %s, %d entries", self.source, len(fresh.agent.entries) if fresh.agent else 0)
            await asyncio.to_thread(remember, fresh)
            return True

    def _adopt(self, fresh: Config) -> None:
        new = fresh.agent
        assert new is not None
        if fresh.trust_domain != self.config.trust_domain:
            raise ConfigError(
                f"the trust domain is another one: {fresh.trust_domain} instead of {self.config.trust_domain}.",
                hint="Restart the agent: every identity of this node changes with it.",
            )
        if not fresh.url:
            refuse_open(fresh.file)
        refuse_blind(fresh)
        self.issuer.follow(fresh)
        self.entries.replace(new.entries)
        self.data.readmit(lost_identities(self.config, fresh))
        self.data.follow(fresh)
        self.admin.admins = frozenset(new.admins)
        try:
            # Who isn't let in by the mode isn't asked who they are.
            self._listening["admin"].admit(_admin_mode(new))
        except OSError as error:
            log.warning("the admin socket keeps its mode: %s", error)
        self.config = fresh
        self.issuer.look()
        late = [f"agent.{key}" for key in _FIXED if getattr(self._begun_with, key) != getattr(new, key)]
        self.late = f"{', '.join(late)}: counts when the agent is restarted" if late else ""
        if late:
            log.warning("%s", self.late)

    async def _look_always(self) -> None:
        """At the configuration's file, whose content is compared, and at what could not be done for the data path."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                self.data.look()
                is_changed = not self.config.url and _digest(self.config.file) != self._tried
                # What could not be used may need something beside it: a mode, a file that it names.
                if is_changed or (not self.config.url and self.fault and time.monotonic() >= self._retry):
                    await self.reload()
            except Exception:
                log.exception("the agent could not look at its parts")

    async def _hear_always(self, origin: ConfigSource) -> None:
        """To a configuration that is no file, and says itself when it is another one."""
        failures = 0
        while True:
            hearing = asyncio.ensure_future(origin.changed())
            try:
                # What could not be used may need something beside it, which comes about without a word of the registry's.
                while not (await asyncio.wait({hearing}, timeout=RETRY))[0] and not self.fault:
                    pass
                if hearing.done():
                    hearing.result()
            except Exception as error:
                failures += 1
                pause = random.uniform(0.0, min(RETRY, LOOK * 2.0 ** min(failures, 10)))
                is_known = isinstance(error, OSError | MeshError)
                log.info(
                    "%s can't be watched, and is asked again in %.1f s: %s", self.source, pause, error, exc_info=not is_known
                )
                await asyncio.sleep(pause)
                continue
            finally:
                hearing.cancel()
            failures = 0
            await self.reload()

    async def _live(self) -> None:
        """Tell the watchdog that the loop turns."""
        every = self._notifier.watchdog
        while every is not None:
            self._notifier.tell(ALIVE, status=self._status())
            await asyncio.sleep(every)

    def _status(self) -> str:
        alarms = report.alarms_of(self)
        first = f"; {alarms[0][1]}" if alarms else ""
        return f"{len(self.issuer.identities)} of {len(self.issuer.rows())} identities{first}"[:200]

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def serve(
    source: str | os.PathLike[str] | None = None,
    *,
    say: Callable[[str], None] = print,
    life: float = RENEWED_LIFE,
    grace: float = GRACE,
) -> bool:
    """Run the agent of a configuration in this process, until it is told to end; True if nothing was cut. Raises MeshError."""
    config = configured(source)
    _take_descriptors()

    async def run() -> bool:
        agent = Agent(config, say=say, life=life, grace=grace)
        agent.check()
        return await agent.run()

    return asyncio.run(run())


def _take_descriptors() -> None:
    """As many as the system lets us have: a connection of the Workload API takes two, and the usual 1,024 are gone with 500 callers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))


# ---------------------------------------------------------------------------------------------------- what is looked at first


def refuse_blind(config: Config) -> None:
    """Entries that no process could ever match, since the agent may not see what they ask for."""
    assert config.agent is not None
    others = sorted({entry.uid for entry in config.agent.entries if entry.uid != os.geteuid()})
    if others and not has_capability(_CAP_SYS_PTRACE):
        raise MeshError(
            f"there are entries for processes of other users (uid {', '.join(map(str, others))}), and this process lacks the right"
            " to see which program they run (/proc/<pid>/exe).",
            hint="Give it CAP_SYS_PTRACE: AmbientCapabilities= in its unit, or by hand setpriv --inh-caps +sys_ptrace"
            " --ambient-caps +sys_ptrace. Or run it as the user of these processes, or as root.",
            reason="agent.rights",
        )


def distrusted(config: Config) -> str:
    """Why services of this node will not believe what is said at our sockets; "" if they will."""
    assert config.agent is not None
    us = os.geteuid()
    others = sorted({entry.uid for entry in config.agent.entries} - {us})
    if not others or us in {0, agent_uid()}:
        return ""
    return (
        f"the agent is user {us}, whom services of other users (uid {', '.join(map(str, others))}) don't believe: they take identities"
        f" from a socket of root's, of the system user {AGENT!r}, or of their own user's. Run it as one of these."
    )


def lost_identities(old: Config, fresh: Config) -> set[str]:
    """The SPIFFE IDs of which an entry is gone or asks for something else: who had them by it may have lost them."""
    assert old.agent is not None
    assert fresh.agent is not None
    # A token buys an identity, and says nothing of who may have it.
    kept = [replace(entry, token=None) for entry in fresh.agent.entries]
    return {old.services[entry.service].identity for entry in old.agent.entries if replace(entry, token=None) not in kept}


def refuse_open(file: Path) -> None:
    """A configuration that others may change: whoever writes an entry is any service of this node."""
    place = Path(os.path.realpath(file))
    for path in (place, place.parent):
        found = path.stat()
        is_open = bool(found.st_mode & 0o022)
        if path != place and (found.st_mode & stat.S_ISVTX or os.statvfs(path).f_flag & os.ST_RDONLY):
            is_open = False  # nobody can take our file away there, or put another one in its place
        if is_open or found.st_uid not in {0, os.geteuid()}:
            raise MeshError(
                f"{path} may be changed by other users (mode {stat.S_IMODE(found.st_mode):04o}, user {found.st_uid}), who could give"
                " themselves any identity of this node.",
                hint=f"chmod go-w {path}, and let it belong to root or to user {os.geteuid()}.",
                reason="agent.open_file",
            )


def has_capability(number: int) -> bool:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    found = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(found.split()[1], 16) >> number & 1)


def _admin_mode(policy: AgentPolicy) -> int:
    """Of the admin socket: closed to all others, unless some of them may ask; then each is judged by who they are."""
    return 0o666 if policy.admins else sockets.MODES["admin"]


def _socket(name: str, path: Path, mode: int, given: dict[str, sockets.Listening]) -> sockets.Listening:
    found = given.get(name)
    if found is None:
        return sockets.open_socket(path, mode)
    if found.path != path:
        raise ListenError(
            f"systemd has opened {found.path}, and the configuration says {path}.",
            hint="Services look for it where the configuration says: correct ListenStream= in the socket's unit, or the file.",
            reason=sockets.PLACE,
        )
    return found


def _digest(file: Path) -> bytes:
    try:
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError as error:
        return str(error.errno).encode()
