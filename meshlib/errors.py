"""What can go wrong, and what may be done about it?

    MeshError                      every error of the mesh; has .reason (stable word), .hint (what to do)
    ├── ConfigError                the configuration can't be used; .problems holds all of them
    ├── IdentityError              who we are can't be proved (key, certificate, bundle)
    │   ├── KeyFileError           a key or certificate file is missing, unreadable or open to others
    │   ├── TrustDomainError       a certificate of another trust domain
    │   └── IdentityWithdrawn      our identity was taken back by who gave it, and must not be used any more
    ├── ListenError                an address can't be listened on
    ├── Refused                    the mesh said no before anything was sent
    │   ├── UnknownService         no Service of that name
    │   ├── NoRoute                the Service has no route for this call
    │   ├── NoEndpoint             nowhere to send it
    │   ├── CircuitOpen            every endpoint is ejected (also a pybreaker.CircuitBreakerError)
    │   ├── LimitExceeded          too many calls in flight
    │   │   └── Throttled          the service refuses most calls, so fewer are sent
    │   ├── RateLimited            too many calls in a time
    │   └── Denied                 not allowed; .rule names what refused it
    ├── DeadlineExceeded           the Call's time is spent
    ├── CallerGone                 the client of the call that we serve has gone away, and this one was on its behalf
    └── AttemptFailed              the last attempt failed, and it was not safe or not affordable to try again
        ├── ConnectFailed          no connection: refused, unreachable, timed out
        ├── PeerIdentityError      the other side did not prove the identity that we expect
        ├── TlsError               the TLS layer failed for another reason
        ├── ConnectionLost         the connection broke after the request was (partly) written
        ├── AttemptTimeout         the endpoint was too slow
        └── ProtocolError          the other side does not speak correct HTTP

The text says what happened, the likely cause and what to do; programs read attributes. Exceptions are defined here and raised
from Rust too. This module imports nothing of meshlib, so that everything may import it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


class MeshError(Exception):
    """Base of everything that meshlib raises on purpose.

    `reason` is a stable word such as ``balance.no_endpoints`` for programs, `hint` says what to do, `call` is the
    `meshlib.Call` that failed, where there is one.
    """

    reason: str = "mesh.error"

    def __init__(self, message: str = "", *, hint: str = "", reason: str | None = None, call: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.call = call
        if reason is not None:
            self.reason = reason

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip() if self.hint else self.message


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration: where it stands, what is wrong, what is allowed."""

    file: str
    line: int
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}: {self.key}: {self.message}"
        return f"{text} ({self.hint})" if self.hint else text


class ConfigError(MeshError):
    """The configuration can't be used. All its mistakes are in `problems`, and one line each in the text.

    A package that refuses its settings knows no file: it says what is wrong in one text, which begins with the key that it speaks of
    (`registries.etcd.timeout must be …`), and names in `unknown` the settings that it doesn't know, in `known` those that it does.
    """

    reason = "config.invalid"

    def __init__(
        self, problems: list[Problem] | str, *, hint: str = "", unknown: Iterable[str] = (), known: Iterable[str] = ()
    ) -> None:
        self.unknown = tuple(unknown)
        self.known = tuple(known)
        if isinstance(problems, str):
            super().__init__(problems, hint=hint)
            self.problems: list[Problem] = []
        else:
            super().__init__("\n".join(str(problem) for problem in problems), hint=hint)
            self.problems = problems


class IdentityError(MeshError):
    reason = "secure.identity"


class KeyFileError(IdentityError):
    reason = "secure.key_file"


class TrustDomainError(IdentityError):
    reason = "secure.trust_domain"


class IdentityWithdrawn(IdentityError):
    """An `IdentitySource` raises it: unlike after any other failure, the last identity is not used any more."""

    reason = "secure.withdrawn"


class ListenError(MeshError):
    reason = "server.listen"


class Refused(MeshError):
    """The mesh refused the call before anything was sent: it's safe to try again later."""

    reason = "mesh.refused"


class UnknownService(Refused):
    reason = "route.unknown_service"


class NoRoute(Refused):
    reason = "route.none"


class NoEndpoint(Refused):
    reason = "balance.no_endpoints"


class LimitExceeded(Refused):
    reason = "admit.limit"


class Throttled(LimitExceeded):
    """The service refuses so much that this process sends less by itself (`admit.throttle`)."""

    reason = "admit.throttle"


class RateLimited(Refused):
    """Too many calls in a time. `retry_after`: seconds until the next one may pass, 0.0 where that isn't known."""

    reason = "admit.rate"

    def __init__(
        self, message: str = "", *, hint: str = "", reason: str | None = None, call: Any = None, retry_after: float = 0.0
    ) -> None:
        super().__init__(message, hint=hint, reason=reason, call=call)
        self.retry_after = retry_after


class Denied(Refused):
    """Not allowed. `rule` names the rule that decided, or says that none allowed it."""

    reason = "secure.denied"

    def __init__(self, message: str = "", *, rule: str = "", hint: str = "", call: Any = None) -> None:
        super().__init__(message, hint=hint, call=call)
        self.rule = rule


class DeadlineExceeded(MeshError, TimeoutError):
    """The call's time is spent; `elapsed` is in seconds."""

    reason = "deadline.exceeded"


class CallerGone(MeshError):
    """The client on whose behalf the call was made has gone away. Only idempotent calls end so."""

    reason = "handle.cancelled"


class AttemptFailed(MeshError):
    """The last attempt failed. `is_written` tells whether a byte of the request may have reached the endpoint."""

    reason = "send.failed"

    def __init__(
        self, message: str = "", *, hint: str = "", reason: str | None = None, call: Any = None, is_written: bool = False
    ) -> None:
        super().__init__(message, hint=hint, reason=reason, call=call)
        self.is_written = is_written


class ConnectFailed(AttemptFailed):
    reason = "send.connect"


class PeerIdentityError(AttemptFailed):
    reason = "secure.peer_identity"


class TlsError(AttemptFailed):
    reason = "secure.tls"


class ConnectionLost(AttemptFailed):
    reason = "send.closed"


class AttemptTimeout(AttemptFailed, TimeoutError):
    reason = "send.timeout"


class ProtocolError(AttemptFailed):
    reason = "send.protocol"


if TYPE_CHECKING:
    from pybreaker import CircuitBreakerError

    class CircuitOpen(Refused, CircuitBreakerError):
        """Every endpoint is ejected."""
else:

    def __getattr__(name: str) -> Any:
        """`CircuitOpen` comes about when somebody asks for it: pybreaker takes 0.2 s to import where redis is installed."""
        if name != "CircuitOpen":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pybreaker import CircuitBreakerError

        known = globals().get(name)
        if known is None:
            body = {"reason": "admit.breaker_open", "__doc__": "Every endpoint is ejected.", "__module__": __name__}
            known = globals().setdefault(name, type(name, (Refused, CircuitBreakerError), body))
        return known
