"""How do others find this process?

While it serves, its entry in a registry is kept by a task on the keeper's loop; when it begins to end, the entry is taken out before the
listeners close, so that callers go elsewhere while whoever comes is still served. The registry's package knows how an entry is made and
kept alive, and judges what is written for it before a configuration comes into force (`judge`); here is decided when it is entered,
under which address, and after how long again when that failed (`pace.py`, as for watches; and not before a watch of the same process is
due for its next try, where none of them lives). A process that dies leaves its entry to the registry's own time limit.

Who leaves has the last word: what waited for the registry meanwhile, or is said while the entry is taken out, enters nothing; whoever
begins anew says so after that.

Each process has an entry of its own, also where several share a listener: it goes with the process, and not with the first of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from meshlib.errors import ConfigError
from meshlib.keeper import Keeper

from .pace import LEAST, Delays
from .registries import Registries
from .registry import Instance, Registration, Registry

if TYPE_CHECKING:
    from meshlib.config.policy import ServicePolicy

logger = logging.getLogger("meshlib.discover")

# Seconds that taking the entry out may take: the drain waits no longer for anybody.
LEAVE: Final = 5.0

# Seconds after which an entry that is kept without an error counts as made, where its package doesn't tell.
SETTLED: Final = 10.0
# Seconds between two looks at what its package tells.
LOOK: Final = 0.1

_EVERYWHERE: Final = ("", "0.0.0.0", "::", "*")
_ANY: Final = "192.0.2.1:1"


class Registrar:
    """The entry of this process. State of the Service that we are.

    `error` is why it isn't as it should be, "" while it is; `failures` are counted over its life.
    """

    def __init__(
        self,
        keeper: Keeper,
        registries: Registries,
        *,
        clock: Callable[[], float] = time.monotonic,
        source: random.Random | None = None,
    ) -> None:
        self._keeper = keeper
        self._registries = registries
        self._clock = clock
        self._random = source or random.SystemRandom()
        self._wanted: tuple[Instance, str, dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._registration: Registration | None = None
        self._registry: Registry | None = None  # whose it is
        # Raised by everybody who decides; who has waited since then asks whether he still has a say.
        self._turn = 0
        self._leaving = 0
        self.failures = 0
        self.error = ""
        self.place = ""  # the registry
        self._since = 0.0  # when the error began
        self._is_settled = False
        self._is_refused = False
        keeper.on_fork(self._after_fork)

    @property
    def instance(self) -> Instance | None:
        """What is entered, or is tried to be."""
        return None if self._wanted is None else self._wanted[0]

    @property
    def is_wanted(self) -> bool:
        """Somebody wants it to be entered."""
        return self._wanted is not None or bool(self.error)

    @property
    def is_entered(self) -> bool:
        """The entry stands, by all that its package says."""
        told = getattr(self._registration, "is_entered", None)
        return self._is_settled if told is None else bool(told)

    @property
    def fault(self) -> str:
        """What somebody should look at, in words; "" for nothing."""
        if not self.error:
            return ""
        state = (
            f"its entry in {self.place} can't be made anew and the old one stays"
            if self.is_entered
            else f"this process is not entered in {self.place} and may not be found"
        )
        return f"{state}, for {self._clock() - self._since:.0f} s: {self.error}"

    async def keep(self, instance: Instance, registry: str, settings: Mapping[str, Any]) -> None:
        """From now on this one, in the registry as it is open now; harmless to say again. On the keeper's loop.

        An entry that is there goes only when the registry's package takes the one in its place.
        """
        wanted = instance, registry, dict(settings)
        is_running = self._task is not None and not self._task.done() and self._task.get_loop() is asyncio.get_running_loop()
        # Closed by a reload that changed its settings, it would go on by itself: with those of before, and perhaps elsewhere.
        is_current = self._wanted == wanted and (self._registry is None or self._registries.is_open(self._registry))
        if self._leaving:
            return
        if is_current and is_running:
            if self._is_refused:  # what was refused meanwhile is not wanted any more
                self._well(registry)
            return
        opened = self._registries.find(registry)
        if opened is None:  # a reload is half through: this is said again within a second
            return
        made = self._registration
        if not is_current or made is None:
            try:
                made = opened.registry.register(instance, for_package(settings))
            except Exception as error:
                self.refused(registry, error)
                return
        self._turn = mine = self._turn + 1
        if not is_current:
            await self._take_out()
            if mine != self._turn:
                return
        self._wanted, self._registration, self._registry = wanted, made, opened.registry
        self._is_refused = False
        self._task = asyncio.get_running_loop().create_task(self._keep(*wanted), name="meshlib-discover: registration")

    def refused(self, registry: str, error: Exception) -> None:
        """An entry could not even be thought of. One that is there stays."""
        self._is_refused = True
        self._failed(registry, error, is_out=False)

    async def leave(self) -> None:
        """Take the entry out, within `LEAVE` seconds. Harmless if there is none. On the keeper's loop."""
        self._turn += 1
        self._leaving += 1
        try:
            await self._take_out()
        finally:
            self._leaving -= 1
            self.error, self._is_refused = "", False

    async def _take_out(self) -> None:
        self._wanted = None
        self._is_settled = False
        task, self._task = self._task, None
        registration, self._registration = self._registration, None
        registry, self._registry = self._registry, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=LEAVE / 2)
        if registration is None:
            return
        try:
            await asyncio.wait_for(registration.leave(), LEAVE / 2)
        except Exception as error:
            logger.warning(
                "this process could not leave its registry, which will find out by itself: %s", str(error) or type(error).__name__
            )
        else:
            logger.info("this process has left its registry")
        if registry is not None and not self._registries.is_open(registry):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(registry.close(), LEAVE / 2)

    async def _keep(self, instance: Instance, name: str, settings: dict[str, Any]) -> None:
        delays = Delays(self._random)
        while True:
            opened = self._registries.find(name)
            try:
                if opened is None:
                    raise ConfigError(f"the registry {name} is not open.")
                # Once: a watch that is refused for a reason of its own fails for ever, and must not keep us out for as long.
                if delays.failures:
                    await asyncio.sleep(opened.pace.wait(self._clock()))
                begun = self._clock()
                if self._registration is None or self._registry is not opened.registry:
                    self._registration, self._registry = None, opened.registry
                    self._registration = opened.registry.register(instance, for_package(settings))
                settling = asyncio.get_running_loop().create_task(self._settle(name, self._registration))
                try:
                    # The same again after an error: it knows what is left of its entry.
                    await self._registration.keep()
                finally:
                    settling.cancel()
            except Exception as error:
                if opened is not None and self._clock() - begun > LEAST:
                    delays.answered()  # it was entered for a while
                self._failed(name, error)
            else:
                self._failed(name, RuntimeError("its package has stopped to keep it"))
            await asyncio.sleep(delays.failed())

    async def _settle(self, name: str, registration: Registration) -> None:
        """Well, as soon as the package says so; of one that doesn't say, after a while without an error."""
        if getattr(registration, "is_entered", None) is None:
            await asyncio.sleep(SETTLED)
        while getattr(registration, "is_entered", True) is False:  # noqa: ASYNC110  another package's attribute
            await asyncio.sleep(LOOK)
        self._is_settled = True
        self._well(name)

    def _failed(self, name: str, error: Exception, *, is_out: bool = True) -> None:
        self.failures += 1
        self.place = name
        if is_out:
            self._is_settled = False
        if not self.error:
            self._since = self._clock()
        text = str(error) or type(error).__name__
        if text != self.error:
            self.error = text
            logger.warning("this process can't be entered in %s, and may not be found until it is: %s", name, text)

    def _well(self, name: str) -> None:
        self.place, self._is_refused = name, False
        if self.error:
            self.error = ""
            logger.info("this process is entered in %s again", name)

    def _after_fork(self) -> None:
        # The parent's entry is the parent's.
        self._task = self._registration = self._registry = self._wanted = None
        self._is_settled, self._is_refused, self.error, self.failures = False, False, "", 0
        self._turn, self._leaving = self._turn + 1, 0


@cache
def _salt(pid: int) -> str:
    """Two containers of one host may have one address and one number of a process: each entry must be its own all the same."""
    return secrets.token_hex(3)


def instance_of(
    service: str,
    listen: str,
    *,
    address: str = "",
    zone: str = "",
    protocol: str = "http",
    settings: Mapping[str, Any] | None = None,
    outward: Callable[[bool], str] | None = None,
) -> Instance:
    """What others are to see of this process. `listen` is where it listens, `address` what is written in its place. Raises ConfigError."""
    key, told = f"services.{service}.register", settings or {}
    if address and _host(address) in _EVERYWHERE:
        raise ConfigError(
            f"{key}.address can't be {address}, which nobody else can call.",
            hint="The address under which others reach this process; or leave it out, and it is that of this host.",
        )
    found = address or advertised(listen, outward or outward_address)
    labels, weight = told.get("labels", {}), told.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0 or not math.isfinite(weight):
        raise ConfigError(f"{key}.weight must be a number above 0.")
    if not isinstance(labels, Mapping) or not all(isinstance(word, str) and word for word in labels.values()):
        raise ConfigError(f"{key}.labels must be a mapping of words.", hint="labels: {version: v2}")
    return Instance(
        service,
        f"{service}-{found}-{os.getpid()}-{_salt(os.getpid())}",
        found,
        zone=zone,
        weight=float(weight),
        labels={str(name): label for name, label in labels.items()},
        protocol=protocol,
    )


def foreseen(service: str, listen: str, *, address: str = "", **said: Any) -> Instance:
    """The same before it serves, so that the rest can be judged: what is known only later (its port, an address of this host) has
    another in its place. Raises ConfigError.
    """
    host, _, port = listen.rpartition(":")
    is_known = bool(host) and port.isascii() and port.isdigit() and int(port) > 0
    return instance_of(service, listen if is_known else _ANY, address=address, outward=_somewhere, **said)


def judge(registry: Registry, own: ServicePolicy, zone: str) -> None:
    """Have the entry of a service made and thrown away: nothing is entered. Raises what its registry's package raises."""
    if own.register is not None:
        instance = foreseen(
            own.name,
            own.listen or "",
            address=own.register.address,
            zone=zone,
            protocol=own.protocol,
            settings=own.register.settings,
        )
        registry.register(instance, for_package(own.register.settings))


def for_package(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `register` without those that are in the Instance already."""
    return {name: value for name, value in settings.items() if name not in ("labels", "weight")}


def _somewhere(is_v6: bool) -> str:
    """An address of the kind, which is kept for documents (RFC 5737, RFC 3849)."""
    return "2001:db8::1" if is_v6 else "192.0.2.1"


def _host(address: str) -> str:
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


def advertised(listen: str, outward: Callable[[bool], str]) -> str:
    """The address of a listener, with that of this host where it listens everywhere. Raises ConfigError."""
    _, colon, port = listen.rpartition(":")
    if listen.startswith("unix:") or not colon or not port.isascii() or not port.isdigit() or not int(port):
        raise ConfigError(
            f"register: it is not known at which address and port this process is reached (it listens at {listen or 'nothing'!r}).",
            hint="Write `address` under `register`, or `listen` with a port.",
        )
    plain = _host(listen)
    if plain in _EVERYWHERE:
        plain = outward(":" in plain)
    return f"[{plain}]:{port}" if ":" in plain else f"{plain}:{port}"


def outward_address(is_v6: bool = False) -> str:
    """The address with which this host leaves for others. Nothing is sent. Raises ConfigError."""
    families = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")]
    for family, somewhere in reversed(families) if is_v6 else families:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((somewhere, 9))
            return str(probe.getsockname()[0])
    raise ConfigError("register: this host has no address that leads outward.", hint="Write `address` under `register`.")
