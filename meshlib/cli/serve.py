"""`meshlib serve module:app`: serve an application inside the mesh.

It finds the application, finds or loads the mesh, and calls `meshlib.server.serve`. An application that made its own mesh on import
(`app = mesh.asgi(app)`) keeps it: `--config` and `--service` are set in the environment before the import, so that both see the same.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshlib.errors import ConfigError

if TYPE_CHECKING:
    from meshlib.server.door import Inside

_DESCRIPTION = """Serve an ASGI application with uvicorn, or a WSGI application with gunicorn, with the certificate of the service.
The mode of the service in mesh.yaml says who gets in."""


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("serve", help="serve an application inside the mesh", description=_DESCRIPTION)
    parser.add_argument("app", metavar="module:app", help="the application, or module:make() for a function that makes it")
    parser.add_argument("--config", metavar="FILE", help="mesh.yaml; default: $MESHLIB_CONFIG, then ./mesh.yaml")
    parser.add_argument(
        "--service", metavar="NAME", help="which service this process is; default: $MESHLIB_SERVICE, then the only one"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--listen", metavar="HOST:PORT", help="default: the service's `listen` in mesh.yaml")
    where.add_argument("--port", type=int, metavar="PORT", help="the same on all interfaces")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="threads of each process, for WSGI (default 8)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--asgi", dest="is_asgi", action="store_const", const=True, help="it is ASGI, however it looks")
    kind.add_argument("--wsgi", dest="is_asgi", action="store_const", const=False, help="it is WSGI, however it looks")


def run(args: argparse.Namespace) -> int:
    from meshlib.server.serve import serve

    if args.workers < 1 or args.threads < 1:
        raise ConfigError("--workers and --threads are numbers from 1 up.")
    _log_to_stderr()
    for variable, value in (("MESHLIB_CONFIG", args.config), ("MESHLIB_SERVICE", args.service)):
        if value is not None:
            os.environ[variable] = value
    app = find(args.app)
    listen = args.listen if args.port is None else f"0.0.0.0:{args.port}"
    serve(mesh_of_process(), app, listen=listen, workers=args.workers, threads=args.threads, is_asgi=args.is_asgi)
    return 0


def find(name: str) -> Any:
    """The object that "module:attribute" names; called, if the name ends with "()"."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{name!r} names no application.", hint="It is module:attribute, as in app:app for `app` in app.py.")
    path, brackets, _ = attribute.partition("()")
    here = str(Path.cwd())
    # First, since that is where the user looks: an installed package may have an app.py, too.
    if sys.path[:1] not in ([here], [""]):
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there, and misses another
        raise ConfigError(
            f"there is no module {module_name!r} in {here} or on the path.", hint="Start it in the folder of the module."
        ) from None
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigError(
                f"the module {module_name!r} has no {path!r}.", hint="Which variable holds the application?"
            ) from None
    return found() if brackets else found


def mesh_of_process() -> Inside:
    """The mesh that the application made when it was imported; otherwise one is loaded."""
    from meshlib.mesh import Mesh
    from meshlib.server import door

    return door.latest().mesh if door.has_latest() else Mesh.load()


def _log_to_stderr() -> None:
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        # A line per outgoing call is noise beside the mesh's own record, and keeps calls off the short path.
        logging.getLogger("httpx").setLevel(logging.WARNING)
