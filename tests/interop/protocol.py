"""What do the peers speak? The messages and stubs of interop.proto, compiled when they are first needed.

Nothing generated is kept in the repository: `compiled` writes into a folder of the caller's, once, and whoever finds the files there (a
child process that was told the folder) only imports them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).with_name("interop.proto")
SERVICE = "grpc.testing.TestService"
UNIMPLEMENTED = f"/{SERVICE}/UnimplementedCall"


class Protocol:
    """The two modules that grpcio-tools makes."""

    def __init__(self, folder: Path, messages: ModuleType, services: ModuleType) -> None:
        self.folder = folder
        self.messages = messages
        self.services = services


def compiled(folder: Path) -> Protocol:
    """Compile into the folder, if that wasn't done before. ImportError where grpcio-tools isn't installed."""
    if not (folder / "interop_pb2_grpc.py").exists():
        from grpc_tools import protoc

        command = ["protoc", f"-I{FILE.parent}", f"--python_out={folder}", f"--grpc_python_out={folder}", str(FILE)]
        if protoc.main(command) != 0:
            raise RuntimeError(f"protoc could not compile {FILE}: its words stand above.")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return Protocol(folder, importlib.import_module("interop_pb2"), importlib.import_module("interop_pb2_grpc"))
