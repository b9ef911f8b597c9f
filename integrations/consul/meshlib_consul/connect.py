"""Who are we, by the CA of Consul's service mesh (Connect)?

The agent makes a key and a certificate for a service (`leaf`), and renews it; the roots come beside it. Both are asked for by
blocking queries on a loop of one thread, which begins with the first `load` of a process: at start that waits some seconds for
the first answers; later it answers what was heard, at once. What was heard is put in force as a whole, and judged like every
other identity.

Consul gives the names: `spiffe://<cluster>.consul/ns/default/dc/<datacenter>/svc/<service>`. The configuration must say the
same (`secure.trust_domain`, and the service's `identity`), or a token that may have the certificate of another service would
make us another; where it says something else, the error tells which name came.

- *The agent is away, or answers errors* (a refused token, too): what we have stays in use to its end, and the store says so.
  Consul has no word for taking an identity back: a leaf counts until it expires, or until its root is gone.
- *A root that is gone* counts at once, and so does a new one.
- *Roots of another trust domain*, none at all, half of a pair: refused, and told.

The key goes over this connection, so it must be TLS, or stay on this machine.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from meshlib.errors import ConfigError, IdentityError, MeshError
from meshlib.secure import Identity, Parts, Secret, prove

from .place import ConsulError, Place, Reader, place_of
from .wire import Answer, Wire

log = logging.getLogger("meshlib.consul")

# Seconds until a query that failed is made again: half of a second, doubled each time up to half a minute, any part of it.
SHORTEST: Final = 0.5
LONGEST: Final = 30.0
# How long the agent may be away before it is told.
NOTICE: Final = 10.0
PACE: Final = 1.0

_watching: weakref.WeakSet[ConnectSource] = weakref.WeakSet()
_left_behind: list[object] = []


class ConnectSource:
    """An `IdentitySource`. State of the process: the leaf and the roots that the agent told last. Any thread may load."""

    def __init__(
        self,
        place: Place,
        service: str,
        spiffe_id: str,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place = place
        self.service = service
        self.spiffe_id = spiffe_id
        self._wall_clock = wall_clock
        self._clock = clock
        self._identity: Identity | None = None
        self._error: MeshError | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._heard = threading.Event()
        self._has_waited = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._wire = Wire(self.place)
        self._leaf: dict[str, Any] | None = None
        self._roots: dict[str, Any] | None = None
        # By question: since when it is not answered, and why.
        self._trouble: dict[str, tuple[float, MeshError]] = {}

    def __repr__(self) -> str:
        state = f"error: {self._error}" if self._error else "well" if self._identity else "no identity yet"
        return f"<ConnectSource of {self.service} at {self.place.name}, {state}>"

    # ------------------------------------------------------------------ as the store asks

    def load(self) -> Identity:
        """The identity of the last good answers. Raises what is wrong since then."""
        self._start()
        if self._identity is None and not self._has_waited:
            # Once: whoever asks again each second must not be held up each time.
            self._heard.wait(self.place.timeout)
            self._has_waited = True
        error, identity = self._error, self._identity
        late = [trouble for since, trouble in tuple(self._trouble.values()) if identity is None or self._clock() - since > NOTICE]
        if error is None and identity is not None and not late:
            return identity
        error = error or (late[0] if late else IdentityError(f"{self.place.name} did not answer in time.", hint="Is it running?"))
        # Each time another object: who catches one adds to it.
        kind = type(error) if isinstance(error, IdentityError) else IdentityError
        raise kind(error.message, hint=error.hint)

    def after_fork(self) -> None:
        """In a forked child: the same identity, a thread and connections of its own."""
        self._wire.after_fork()
        _left_behind.extend([self._loop, self._task])
        self._begin_anew()

    def close(self) -> None:
        """End the thread and its connections. Who loads after that begins anew."""
        with self._lock:
            thread, loop, task = self._thread, self._loop, self._task
            self._thread = threading.current_thread()  # nobody begins meanwhile
        if loop is not None and task is not None:
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                log.debug("the loop of the source had ended already")
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)
        self._identity = self._error = None
        self._begin_anew()

    # ------------------------------------------------------------------ the thread

    def _start(self) -> None:
        thread = self._thread
        if thread is None or not thread.is_alive():
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    _watching.add(self)
                    is_ready = threading.Event()
                    self._thread = threading.Thread(target=self._run, args=(is_ready,), name="meshlib-consul", daemon=True)
                    self._thread.start()
                    is_ready.wait(5.0)

    def _run(self, is_ready: threading.Event) -> None:
        async def watch() -> None:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            is_ready.set()
            wire = self._wire
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._follow(wire, "leaf", f"/v1/agent/connect/ca/leaf/{self.service}"))
                    both.create_task(self._follow(wire, "roots", "/v1/agent/connect/ca/roots"))
            finally:
                await wire.close()

        try:
            asyncio.run(watch())
        except asyncio.CancelledError:
            pass
        except BaseException:
            log.exception("%s can't be listened to", self.place.name)
        finally:
            is_ready.set()

    async def _follow(self, wire: Wire, what: str, path: str) -> None:
        """Ask one question for ever. It never ends by itself: a fault of ours is logged, and it is asked again."""
        index = tries = quick = 0
        while True:
            began = self._clock()
            try:
                answer = await wire.ask("GET", path, index=index)
                came = answer.index
                index = came if came >= max(index, 1) else 0
                self._take(what, answer)
                tries, quick = 0, quick + 1 if self._clock() - began < PACE else 0
                # An index that doesn't block must not make a busy loop.
                await asyncio.sleep(PACE if quick > 2 else 0)
            except Exception as error:
                if not isinstance(error, MeshError):
                    log.exception("the %s of %s can't be used", what, self.place.name)
                self._fail(what, error)
                index, tries = 0, tries + 1
                await asyncio.sleep(random.uniform(0, min(LONGEST, SHORTEST * 2.0 ** min(tries, 10))))

    def _take(self, what: str, answer: Answer) -> None:
        """Keep one half, and put both in force. Raises what is wrong with them; what was good before stays."""
        try:
            said = json.loads(answer.raw)
        except (ValueError, RecursionError):
            raise self._wrong(f"its {what} can't be read") from None
        if not isinstance(said, dict):
            raise self._wrong(f"its {what} can't be read")
        setattr(self, f"_{what}", said)
        self._trouble.pop(what, None)
        if self._leaf is None or self._roots is None:
            return
        try:
            parts = self._parts(self._leaf, self._roots)
            made = prove(parts, self.spiffe_id, self._wall_clock(), last=self._identity)
        except MeshError as error:
            self._error = error.with_traceback(None)
            self._heard.set()
            return
        kept = self._identity
        if kept is None or _content(kept) != _content(made):
            self._identity = made
        self._error = None
        self._heard.set()

    def _parts(self, leaf: Mapping[str, Any], roots: Mapping[str, Any]) -> Parts:
        came = leaf.get("ServiceURI")
        if isinstance(came, str) and came != self.spiffe_id:
            shown = came if came.isprintable() else repr(came)
            domain = shown.removeprefix("spiffe://").split("/")[0]
            raise IdentityError(
                f"{self.place.name} says that the service {self.service} is {shown[:300]}, and the configuration calls this "
                f"service {self.spiffe_id}.",
                hint=f"In mesh.yaml: secure: {{trust_domain: {domain[:100]}}}, and identity: {shown[:300]} under this service.",
            )
        chain, key = leaf.get("CertPEM"), leaf.get("PrivateKeyPEM")
        listed = roots.get("Roots")
        pems = [root.get("RootCert") if isinstance(root, dict) else None for root in listed] if isinstance(listed, list) else []
        good = {pem.strip() for pem in pems if isinstance(pem, str)}
        if not isinstance(chain, str) or not isinstance(key, str) or not all(good) or not good or None in pems:
            raise self._wrong("its answer lacks the certificate, the key or the roots")
        try:
            # As the agent writes it (SEC 1), not every TLS library takes it.
            loaded = load_pem_private_key(key.encode(), None)
        except (ValueError, TypeError):
            raise self._wrong("the key that it gave can't be read") from None
        private = loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        bundle = "\n".join(sorted(good)) + "\n"
        return Parts(chain.encode(), Secret(private), bundle.encode())

    def _fail(self, what: str, error: Exception) -> None:
        found = (
            error
            if isinstance(error, MeshError)
            else self._wrong(f"its {what} can't be used ({type(error).__name__}, see the log)")
        )
        since = self._trouble[what][0] if what in self._trouble else self._clock()
        self._trouble[what] = (since, found.with_traceback(None))
        if isinstance(error, ConsulError) and error.status in {401, 403, 404}:
            self._heard.set()  # nothing better will come while somebody waits for it

    def _wrong(self, what: str) -> IdentityError:
        return IdentityError(f"{self.place.name}: {what}.", hint="Is its service mesh on (connect { enabled = true })?")


@atexit.register
def _end_all() -> None:
    for source in list(_watching):
        source.close()


def open_source(settings: Mapping[str, Any], *, spiffe_id: str, trust_domain: str) -> ConnectSource:
    """The factory behind the entry point. `settings` are those of `secure.identity` in mesh.yaml."""
    reader = Reader("secure.identity", settings)
    place = place_of(reader)
    service = reader.text("service", _service_in(spiffe_id))
    reader.end()
    if not place.is_private:
        raise ConfigError(
            f"secure.identity.url: {place.url} would carry our private key in plain text over the network.",
            hint="Ask the agent of this machine (http://127.0.0.1:8500), or use https.",
        )
    return ConnectSource(place, service, spiffe_id)


def _service_in(spiffe_id: str) -> str:
    """What Consul calls the service: the end of its SPIFFE ID, in Consul's form and in the mesh's own."""
    return spiffe_id.rsplit("/", 1)[-1]


def _content(identity: Identity) -> tuple[object, ...]:
    return identity.chain, identity.key, identity.bundles, identity.crls, identity.notes
