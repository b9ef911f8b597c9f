"""Which peers of other languages are there, and how are they built and started?

They are the interoperability clients and servers that the gRPC projects publish for each other, unchanged: grpc-go's from the Go module
proxy, grpc-java's from Maven Central. What is built stays in a folder outside of the repository's history, by version.

What their flags can't do: neither client can show a certificate, so that neither reaches a server in mode enforce but through a proxy;
grpc-java's server shows a certificate of its own test CA only. Their servers listen on all interfaces.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

# How a command is run while the user is told of it: where, what for, and its words; raises RuntimeError.
Run = Callable[[Path, str, list[str], dict[str, str]], None]

NO_CERTIFICATE = "its client has no flag for a certificate: mutual TLS by way of Envoy only"


class Peer:
    """The client and the server of another gRPC."""

    name = ""
    version = ""
    needs: tuple[str, ...] = ()
    has_own_certificate = False  # its server can show a certificate that we give it
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """Why it can't be had here; empty if it can."""
        absent = [program for program in self.needs if shutil.which(program) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""

    def build(self, cache: Path, run: Run) -> None:
        raise NotImplementedError

    def client(self, port: int, scenario: str) -> list[str]:
        """The command that runs a scenario against a plain port of loopback, and exits with other than 0 if it fails."""
        raise NotImplementedError

    def server(self, port: int, certificate: tuple[Path, Path] | None = None) -> list[str]:
        """The command that serves, in plain text or with a certificate and its key."""
        raise NotImplementedError


class Go(Peer):
    name, version, needs = "grpc-go", "1.85.0", ("go",)
    has_own_certificate = True
    notes = (NO_CERTIFICATE, "its server shows a certificate of the mesh's CA (columns tls), but asks for none")

    def build(self, cache: Path, run: Run) -> None:
        self._folder = cache / f"go-{self.version}"
        for program in ("client", "server"):
            if not (self._folder / program).exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                module = f"google.golang.org/grpc/interop/{program}@v{self.version}"
                run(self._folder, f"{self.name}'s {program}", ["go", "install", module], {"GOBIN": str(self._folder)})

    def client(self, port: int, scenario: str) -> list[str]:
        return [str(self._folder / "client"), "-server_host=127.0.0.1", f"-server_port={port}", f"-test_case={scenario}"]

    def server(self, port: int, certificate: tuple[Path, Path] | None = None) -> list[str]:
        tls = [] if certificate is None else ["-use_tls", f"-tls_cert_file={certificate[0]}", f"-tls_key_file={certificate[1]}"]
        return [str(self._folder / "server"), f"-port={port}", *tls]


class Java(Peer):
    name, version, needs = "grpc-java", "1.79.0", ("java", "mvn")
    notes = (NO_CERTIFICATE, "its server shows a certificate of its own test CA only: no TLS without Envoy")

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

    def client(self, port: int, scenario: str) -> list[str]:
        where = ("--server_host=127.0.0.1", f"--server_port={port}")
        return self._main("TestServiceClient", *where, "--use_tls=false", f"--test_case={scenario}")

    def server(self, port: int, certificate: tuple[Path, Path] | None = None) -> list[str]:
        assert certificate is None
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
