"""Which peers of other languages are there, and how are they built and started?

They are the interoperability clients and servers that the gRPC projects publish for each other, unchanged: grpc-go's from the Go module
proxy, grpc-java's from Maven Central. What is built stays in a folder outside of the repository's history, by version.

What their flags can't do: neither client can show a certificate, so that neither reaches a server in mode enforce but through a proxy;
grpc-java's server shows a certificate of its own test CA only. For grpc-go, mutual.go runs the same scenarios with certificates of the
mesh's CA on both sides. Their servers, but for that one, listen on all interfaces.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# How a command is run while the user is told of it: where, what for, and its words; raises RuntimeError.
Run = Callable[[Path, str, list[str], dict[str, str]], None]

NO_CERTIFICATE = "its client has no flag for a certificate of its own: in mode enforce it goes by way of Envoy (columns envoy)"


@dataclass(frozen=True)
class Secured:
    """What a peer needs for TLS with the mesh. `peer` is whom it must meet; an empty one means that it asks nobody for a certificate."""

    identity: Path  # a folder with svid.pem, key.pem and bundle.pem
    dns_name: str
    peer: str = ""


class Peer:
    """The client and the server of another gRPC."""

    name = ""
    version = ""
    needs: tuple[str, ...] = ()
    serves_tls = False
    speaks_mutual_tls = False
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """Why it can't be had here; empty if it can."""
        absent = [program for program in self.needs if shutil.which(program) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""

    def build(self, cache: Path, run: Run) -> None:
        raise NotImplementedError

    def client(self, port: int, scenario: str, secured: Secured | None = None) -> list[str]:
        """The command that runs a scenario against a port of loopback, and exits with other than 0 if it fails."""
        raise NotImplementedError

    def server(self, port: int, secured: Secured | None = None) -> list[str]:
        """The command that serves."""
        raise NotImplementedError


class Go(Peer):
    name, version, needs = "grpc-go", "1.85.0", ("go",)
    serves_tls = speaks_mutual_tls = True
    notes = (
        NO_CERTIFICATE,
        "its server shows a certificate of the mesh's CA, but asks for none (columns tls)",
        "its scenarios with certificates on both sides are run by tests/interop/mutual.go (columns mtls)",
    )

    def build(self, cache: Path, run: Run) -> None:
        self._folder = cache / f"go-{self.version}"
        for program in ("client", "server"):
            if not (self._folder / program).exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                module = f"google.golang.org/grpc/interop/{program}@v{self.version}"
                run(self._folder, f"{self.name}'s {program}", ["go", "install", module], {"GOBIN": str(self._folder)})
        self._build_mutual(run)

    def _build_mutual(self, run: Run) -> None:
        source, folder = Path(__file__).with_name("mutual.go").read_text(), self._folder / "src"
        built = folder / "built.go.txt"
        if built.exists() and built.read_text() == source:
            return
        folder.mkdir(exist_ok=True)
        (folder / "main.go").write_text(source)
        (folder / "go.mod").write_text(f"module mutual\n\ngo 1.26\n\nrequire google.golang.org/grpc v{self.version}\n")
        what = f"{self.name}'s scenarios with mutual TLS"
        run(folder, what, ["go", "mod", "tidy"], {})
        run(folder, what, ["go", "build", "-o", str(self._folder / "mutual"), "."], {})
        built.write_text(source)

    def client(self, port: int, scenario: str, secured: Secured | None = None) -> list[str]:
        if secured is not None:
            return self._mutual(port, secured, f"-scenario={scenario}")
        return [str(self._folder / "client"), "-server_host=127.0.0.1", f"-server_port={port}", f"-test_case={scenario}"]

    def server(self, port: int, secured: Secured | None = None) -> list[str]:
        if secured is not None and secured.peer:
            return self._mutual(port, secured, "-serve")
        tls = []
        if secured is not None:
            tls = ["-use_tls", f"-tls_cert_file={secured.identity / 'svid.pem'}", f"-tls_key_file={secured.identity / 'key.pem'}"]
        return [str(self._folder / "server"), f"-port={port}", *tls]

    def _mutual(self, port: int, secured: Secured, *more: str) -> list[str]:
        who = (f"-identity={secured.identity}", f"-peer={secured.peer}", f"-name={secured.dns_name}")
        return [str(self._folder / "mutual"), f"-port={port}", *who, *more]


class Java(Peer):
    name, version, needs = "grpc-java", "1.79.0", ("java", "mvn")
    notes = (
        NO_CERTIFICATE,
        "its server shows a certificate of its own test CA only, which the mesh's client can't be told to believe",
    )

    def build(self, cache: Path, run: Run) -> None:
        folder = cache / f"java-{self.version}"
        self._libraries = folder / "lib"
        if not (folder / "complete").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pom.xml").write_text(_POM.format(version=self.version))
            goal = ["dependency:copy-dependencies", f"-DoutputDirectory={self._libraries}"]
            run(folder, f"{self.name}'s client and server", ["mvn", "-q", "-B", *goal], {})
            (folder / "complete").touch()

    def _main(self, name: str, *arguments: str) -> list[str]:
        # Seconds of life are not worth an optimising compiler.
        java = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", f"{self._libraries}/*"]
        return [*java, f"io.grpc.testing.integration.{name}", *arguments]

    def client(self, port: int, scenario: str, secured: Secured | None = None) -> list[str]:
        assert secured is None
        where = ("--server_host=127.0.0.1", f"--server_port={port}")
        return self._main("TestServiceClient", *where, "--use_tls=false", f"--test_case={scenario}")

    def server(self, port: int, secured: Secured | None = None) -> list[str]:
        assert secured is None
        return self._main("TestServiceServer", f"--port={port}", "--use_tls=false", "--address_type=IPV4")


_POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>interop</groupId>
  <artifactId>interop</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>io.grpc</groupId>
      <artifactId>grpc-interop-testing</artifactId>
      <version>{version}</version>
    </dependency>
  </dependencies>
</project>
"""
