"""What isn't well about our identity, although calls go on?

An alarm stands from the moment when something isn't well until it is over. It is told once, when it begins: in the log, and to
who asked for it (`IdentityStore.on_alarm`). What stands is in `IdentityStore.alarms`, for metrics and for `meshlib status`.

    life          three quarters of the certificate's life are gone, and nothing has renewed it
    expired       it has ended, and peers refuse it
    clock         this machine's clock was set back, so that the certificate isn't valid by it yet; it stays in use
    withdrawn     our identity was taken back: nothing is called or served with it
    revocations   a list of revocations is out of date; it goes on counting
    note          a part was left out, or an older one was kept, that is not worth the identity
    federation    there is no bundle of another trust domain, or an old one

Nothing is decided here: what becomes of an identity is the store's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .identity import Identity

log = logging.getLogger("meshlib.secure")

# The share of a certificate's life after which somebody should look why it was not renewed.
LATE: Final = 0.75

_GRAVE: Final = frozenset({"expired", "withdrawn"})


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that isn't well. `about` tells those of a kind apart: a trust domain, or the text of a note."""

    kind: str
    about: str
    message: str


class Alarms:
    """State of an identity store: what stands, and who wants to be told."""

    __slots__ = ("_callbacks", "_standing")

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Alarm], None]] = []
        self._standing: dict[tuple[str, str], Alarm] = {}

    @property
    def standing(self) -> tuple[Alarm, ...]:
        return tuple(self._standing.values())

    def on_begin(self, callback: Callable[[Alarm], None]) -> None:
        self._callbacks.append(callback)

    def judge(self, found: Iterable[Alarm]) -> list[Alarm]:
        """Put what was found in the place of what stood, and log both ends; answers what has begun."""
        standing = {(alarm.kind, alarm.about): alarm for alarm in found}
        begun = [alarm for key, alarm in standing.items() if key not in self._standing]
        for alarm in begun:
            log.log(logging.ERROR if alarm.kind in _GRAVE else logging.WARNING, "%s", alarm.message)
        for kind, about in self._standing.keys() - standing.keys():
            log.info("the alarm %r is over%s", kind, f": {about}" if about else "")
        self._standing = standing
        return begun

    def tell(self, begun: list[Alarm]) -> None:
        """Call back; one who fails keeps nobody else from it."""
        for alarm in begun:
            for callback in tuple(self._callbacks):
                try:
                    callback(alarm)
                except Exception:
                    log.exception("a callback on an alarm failed")


def of_withdrawn(serial: str) -> Alarm:
    return Alarm("withdrawn", "", f"our identity was withdrawn, and nothing is called or served with it: serial {serial}")


def of_identity(current: Identity, now: float, revocations_end: float) -> Iterator[Alarm]:
    """What isn't well about an identity that is in force."""
    left, spent = current.not_after - now, current.spent(now)
    if left <= 0:
        yield Alarm("expired", "", f"our certificate has expired, and peers refuse it: serial {current.serial}")
    if spent > LATE:
        share = f"{100 * spent:.0f} % of our certificate's life are gone"
        yield Alarm("life", "", f"{share} and nothing renewed it: serial {current.serial} ends in {left:.0f} s")
    if now < current.not_before:
        what = "this machine's clock was set back: our certificate is not valid by it for another"
        yield Alarm("clock", "", f"{what} {current.not_before - now:.0f} s, and stays in use (serial {current.serial})")
    if now >= revocations_end:
        what = "a list of revocations is out of date: what it revokes stays revoked, and what was revoked since is not known"
        yield Alarm("revocations", "", f"{what}. Publish it anew (`meshlib ca publish`)")


def of_notes(notes: Iterable[str]) -> Iterator[Alarm]:
    return (Alarm("note", note, note) for note in notes)


def of_federation(faults: Mapping[str, str]) -> Iterator[Alarm]:
    return (Alarm("federation", name, f"the bundle of the trust domain {name}: {fault}") for name, fault in faults.items())
