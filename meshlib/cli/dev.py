"""How do I run a service of the mesh on my own machine, without setting up certificates?

`meshlib dev -- COMMAND` runs a command with a throw-away identity for every service of mesh.yaml, in a trust domain
that counts nowhere else, with addresses on loopback only. Certificates live an hour and are renewed at half of it.
Signals go on to the command, its exit code comes back, and the folder with the keys is gone at the end. Without a
command it prints what other shells have to export, and keeps the folder until Ctrl-C: so several services can be
started in several terminals.

One thread waits for signals; there are no handlers, so nothing can interrupt the tidying up.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Final

from meshlib.errors import MeshError
from meshlib.secure.dev import VARIABLE, DevIdentities

_PASSED_ON: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
_ENDING: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
_WAITED_FOR: Final = _PASSED_ON | {signal.SIGCHLD}
# After a failed renewal half of the certificates' life is left: try soon, and do not flood the terminal.
_AGAIN: Final = 60.0


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "dev",
        help="run a command with a throw-away authority, on loopback",
        description=__doc__,
        usage="meshlib dev [-h] [--config FILE] [-- COMMAND …]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="default: $MESHLIB_CONFIG, then ./mesh.yaml")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run; without it, wait until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    from meshlib.config import examine

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    before = os.environ.get(VARIABLE)
    # Inherited "ignore" would let the kernel throw the command's exit code away.
    on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    try:
        with DevIdentities() as identities:
            # It has to be set first: it is what makes the configuration one of development.
            os.environ[VARIABLE] = str(identities.folder)
            examined = examine(args.config)
            identities.issue({name: policy.identity for name, policy in examined.services.items()})
            settings = {VARIABLE: str(identities.folder), "MESHLIB_CONFIG": examined.place}
            if not words:
                return _hold(identities, settings, list(examined.services))
            return _guard(identities, _start(words, os.environ | settings, mask))
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, on_child)


def _start(words: list[str], environment: dict[str, str], mask: set[int | signal.Signals]) -> int:
    try:
        return os.posix_spawnp(words[0], words, environment, setsigmask=mask)
    except OSError as error:
        raise MeshError(f"{words[0]} can't be started: {error.strerror}.", hint="Is it installed, and on the PATH?") from error


def _guard(identities: DevIdentities, process: int) -> int:
    """Wait for the command, and meanwhile renew and pass signals on; its exit code, 128 + n if signal n ended it."""
    due = time.monotonic() + identities.renew_every
    while True:
        due, arrived = _wait(identities, due)
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        # What the terminal sends (Ctrl-C) goes to the whole group: the command has it already. A kill reaches us alone.
        if arrived is not None and arrived.si_signo in _PASSED_ON and arrived.si_code <= 0:
            os.kill(process, arrived.si_signo)


def _hold(identities: DevIdentities, settings: dict[str, str], services: list[str]) -> int:
    print("# In each terminal that runs a service:")
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"export MESHLIB_SERVICE=…   # {', '.join(services)}")
    print("# Ctrl-C here ends it, and removes the keys.", flush=True)
    due = time.monotonic() + identities.renew_every
    while True:
        due, arrived = _wait(identities, due)
        if arrived is not None and arrived.si_signo in _ENDING:
            return 0 if arrived.si_signo == signal.SIGINT else 128 + arrived.si_signo


def _wait(identities: DevIdentities, due: float) -> tuple[float, signal.struct_siginfo | None]:
    """Sleep until a signal comes or renewal is due; when it is due next, and the signal."""
    arrived = signal.sigtimedwait(_WAITED_FOR, max(0.0, due - time.monotonic()))
    if time.monotonic() < due:
        return due, arrived
    try:
        identities.renew()
    except (OSError, MeshError) as error:
        print(
            f"meshlib dev: the certificates in {Path(identities.folder)} can't be renewed: {error}",
            file=sys.stderr,
            flush=True,
        )
        return time.monotonic() + _AGAIN, arrived
    return time.monotonic() + identities.renew_every, arrived
