"""At which addresses does a process listen, and what is said when that can't be?

Up to three: the mesh port; the public one, for callers without an identity; and the plain one for probes. They are bound before anything
else is started, so that a port in use is an error with a name, and not a line in a log; and before workers fork, so that all of these
have them. Who asks for one that can't be had gets none of the others either.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import Final

from ..errors import ListenError

BACKLOG: Final = 2048
# Who may connect to a UNIX socket of ours: our user, our group and root. What a caller may do is not decided by that.
SHARED: Final = 0o660
# Where the node agent hands calls over, anybody: to connect is to write, the agent has a user of its own, and no right to the files of
# others. The border there is the secret of the hand-over (`handed.py`): who comes without it has no identity, as at an open port. The
# agent's user can't be told beforehand: systemd opens its sockets as root, and either of us may start first.
HANDED: Final = 0o666


class Listeners:
    """The listening sockets of one process, or of one that forks."""

    __slots__ = ("mesh", "probe", "public")

    def __init__(self, listen: str, public: str | None = None, probe: str | None = None, *, mode: int = SHARED) -> None:
        """Raises ListenError; then nothing is left open. `mode`: who may connect to `listen`, where that is a UNIX socket."""
        self.mesh = bind(listen, mode)
        self.public: socket.socket | None = None
        self.probe: socket.socket | None = None
        try:
            self.public = bind(public) if public is not None else None
            if self.public is not None and _port(self.public) == _port(self.mesh):
                raise ListenError(
                    f"{listen} and the public listener {public} have the same port.",
                    hint="They are told apart by their ports: give one of them another, whatever the addresses.",
                )
            self.probe = bind(probe) if probe is not None else None
        except ListenError:
            self.close()
            raise

    @property
    def serving(self) -> list[socket.socket]:
        """Those that the server itself accepts on."""
        return [self.mesh] if self.public is None else [self.mesh, self.public]

    def close(self) -> None:
        for sock in (self.mesh, self.public, self.probe):
            if sock is not None:
                sock.close()

    def __str__(self) -> str:
        named = (("", self.mesh), ("public ", self.public), ("probes ", self.probe))
        return ", ".join(name + _place(sock) for name, sock in named if sock is not None)


def _port(sock: socket.socket) -> int:
    """0 for a UNIX socket."""
    name = sock.getsockname()
    return int(name[1]) if isinstance(name, tuple) else 0


def _place(sock: socket.socket) -> str:
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return str(name)
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(address: str, mode: int = SHARED) -> socket.socket:
    """A listening socket at "host:port" or "unix:/path", or the one that was handed over as "fd:3". Raises ListenError with what to do."""
    if address.startswith("fd:"):
        return _inherited(address)
    if address.startswith("unix:"):
        return _local(address.removeprefix("unix:"), mode)
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ListenError(
            f"{address!r} is no address to listen on.", hint='It is "host:port", as in "127.0.0.1:8000" or "0.0.0.0:8443".'
        )
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ListenError(f"{address} can't be listened on: {error}.", hint="Is the name of the host right?") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"{address} can't be listened on: {error.strerror or error}.", hint=_hint(error.errno, port)) from None
    return sock


def _local(path: str, mode: int) -> socket.socket:
    """A UNIX socket with that mode. One that nobody listens on any more is left from an earlier process, and goes."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if Path(path).is_socket() and sock.connect_ex(path) == errno.ECONNREFUSED:
                Path(path).unlink()
        sock.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(path)
        Path(path).chmod(mode)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        hint = (
            "Another process listens there."
            if error.errno == errno.EADDRINUSE
            else "Is its folder there, and may we write to it?"
        )
        raise ListenError(f"{path} can't be listened on: {error.strerror or error}.", hint=hint) from None
    return sock


def _inherited(address: str) -> socket.socket:
    """A socket that a supervisor keeps over our restarts, so that no connection is refused meanwhile."""
    try:
        sock = socket.socket(fileno=int(address.removeprefix("fd:")))
        is_listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except (OSError, ValueError) as error:
        raise ListenError(
            f"{address} can't be listened on: {error}.", hint="Was the descriptor handed to this process?"
        ) from None
    if not is_listening:
        raise ListenError(f"{address} is a socket that does not listen.", hint="Hand over one on which listen() was called.")
    return sock


def _hint(code: int | None, port: str) -> str:
    if code == errno.EADDRINUSE:
        who = f"`ss -ltnp 'sport = :{port}'` names it"
        return f"Another process has the port, perhaps an older one of this service ({who}). Stop it, or take another port."
    if code in (errno.EACCES, errno.EPERM):
        return f"Ports below 1024 are for the superuser: take a higher one than {port}, or give the process CAP_NET_BIND_SERVICE."
    if code == errno.EADDRNOTAVAIL:
        return "This machine has no such address: take one of its own, or 0.0.0.0 for all."
    return "See the message of the operating system."
