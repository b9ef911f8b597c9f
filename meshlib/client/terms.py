"""On which terms does one call go out?

What the application asked for this call beyond the configuration: httpx's timeouts, a policy of the mesh, and whether it reads the
answer as a stream. Nearly every call asks for nothing and shares one object, `ORDINARY`, so that the way pays one comparison for
all of it. The times between two pieces of a body are the drivers' to keep; they ask here what applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..call import NO_POLICY, CallPolicy

# A body from this size on is written in pieces, so that a write timeout can be kept and memory isn't doubled.
LARGE = 1024 * 1024
# Seconds that stand for no end at all, within every clock's range.
FOREVER = 3e9
# Retries of a call whose own `stop` says when it is enough; the budget and the deadline hold all the same.
MOST_RETRIES = 10


@dataclass(frozen=True, slots=True)
class Terms:
    """All times in seconds; None leaves it to the configuration, or (of an explicit httpx timeout) sets no limit.

    `is_explicit`: the caller gave httpx timeouts, and they win over the route's deadline. `is_stream`: the route's deadline ends with
    the answer's head. `is_private`: the URL promises TLS. `timeout` and
    `retries` stand in for the route's. The rest is the call's own, as in `CallPolicy`.
    """

    connect: float | None = None
    read: float | None = None
    write: float | None = None
    is_explicit: bool = False
    is_stream: bool = False
    is_private: bool = False
    idempotent: bool | None = None
    timeout: float | None = None
    retries: int | None = None
    hedge: float | None = None
    zone: str | None = None
    key: str | None = None
    labels: Mapping[str, str] | None = None
    wait: Callable[[Any], float] | None = None
    stop: Callable[[Any], bool] | None = None

    @property
    def most_retries(self) -> int | None:
        """Retries in place of the route's: as many as there may be where `stop` decides."""
        return MOST_RETRIES if self.retries is None and self.stop is not None else self.retries

    @property
    def whole(self) -> float | None:
        """Seconds for the whole call in place of the route's deadline."""
        return FOREVER if self.timeout is None and self.is_explicit else self.timeout


ORDINARY = Terms()

# What httpx puts into a request when nobody asked for anything: its own five seconds are a default, not a wish.
_HTTPX_DEFAULT = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0}


class Unset(dict[str, float | None]):
    """The timeouts of a client for which none were given. They look like httpx's default, but the mesh's own apply."""


class Asked(dict[str, float | None]):
    """The timeouts that somebody asked a mesh client for, even if they are httpx's default."""


UNSET = Unset(_HTTPX_DEFAULT)


def terms_of(extensions: Mapping[str, Any], *, is_private: bool = False) -> Terms:
    """The terms that a request of httpx carries in its extensions: `timeout`, `meshlib.policy` and `meshlib.stream`; and its URL."""
    given = extensions.get("timeout")
    # Of a client that isn't ours, on a transport that is, nobody can tell whether the default was asked for.
    is_explicit = given is not None and type(given) is not Unset and (type(given) is Asked or given != _HTTPX_DEFAULT)
    policy = extensions.get("meshlib.policy")
    is_stream = "meshlib.stream" in extensions
    if not is_explicit and policy is None and not is_stream and not is_private:
        return ORDINARY
    times = given if is_explicit and given is not None else {}
    if policy is None:
        policy = NO_POLICY
    elif not isinstance(policy, CallPolicy):
        policy = CallPolicy(**policy)
    return Terms(
        connect=times.get("connect"),
        read=times.get("read"),
        write=times.get("write"),
        is_explicit=is_explicit,
        is_stream=is_stream,
        is_private=is_private,
        idempotent=policy.idempotent,
        timeout=policy.timeout,
        retries=policy.retries,
        hedge=policy.hedge,
        zone=policy.zone,
        key=policy.key,
        labels=policy.labels,
        wait=policy.wait,
        stop=policy.stop,
    )
