"""How does a call leave for a host that is no Service?

By httpx's own transports, chosen as httpx would choose them: by proxy (its argument, HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY),
with its `verify`, `cert`, `http1`, `http2` and `limits`. A stock client is kept for that choice, and made when the first call leaves,
since an SSL context costs milliseconds and many processes never call outside. The roots are the platform's: $SSL_CERT_FILE or
$SSL_CERT_DIR (with `trust_env`), then the store that OpenSSL was built for, and httpx's own (certifi's) only where that is empty.
Answers and errors are httpx's own. Nothing here sees a call to a Service, so that no proxy variable can capture one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import ssl
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import errors

if TYPE_CHECKING:
    from .way import OutboundWay

# Options of an httpx client that are about the network: they belong to egress.
NETWORK = ("verify", "cert", "http1", "http2", "proxy", "limits", "trust_env")
# A folder of roots is looked up by these names, so that other files in it don't count.
_HASHED = re.compile(r"[0-9a-fA-F]{8}\.\d+")


def check_egress(host: str, egress: str) -> None:
    """Refuse what is no Service and may not leave. A bare name is a Service that is missing, never a host outside."""
    if "." not in host and ":" not in host and host != "localhost":
        raise errors.UnknownService(
            f"no service is called {host!r}.", hint="Add it to mesh.yaml; a host outside the mesh needs a dot in its name."
        )
    if egress == "deny":
        raise errors.Denied(
            f"{host!r} is not a service, and egress is denied.", rule="egress: deny", hint="Set `egress: allow` in mesh.yaml."
        )


def leave(way: OutboundWay, host: str) -> None:
    """A call goes to a host that is no Service: may it, and then it is counted."""
    check_egress(host, way.egress)
    if way.observer is not None:
        way.observer.egress(host)


def roots(httpx: ModuleType, *, trust_env: bool = True) -> ssl.SSLContext:
    """A context that trusts whom the platform trusts."""
    if trust_env and (file := os.environ.get("SSL_CERT_FILE")):
        return ssl.create_default_context(cafile=file)
    if trust_env and (folder := os.environ.get("SSL_CERT_DIR")):
        return ssl.create_default_context(capath=folder)
    # What OpenSSL was built for, and not `load_default_certs`, which reads the variables whatever `trust_env` says.
    paths = ssl.get_default_verify_paths()
    store = paths.openssl_cafile if Path(paths.openssl_cafile).is_file() else None
    folder = paths.openssl_capath if _has_roots(paths.openssl_capath) else None
    if store is not None or folder is not None:
        context = ssl.create_default_context(cafile=store, capath=folder)
        if folder is not None or context.cert_store_stats()["x509_ca"]:
            return context
    default: ssl.SSLContext = httpx.create_ssl_context(trust_env=False)
    return default


def _has_roots(folder: str) -> bool:
    try:
        return any(_HASHED.fullmatch(file.name) for file in Path(folder).iterdir())
    except OSError:
        return False


class Egress:
    """The stock transports of one client. Those of an asynchronous client belong to the loop that made them."""

    def __init__(self, httpx: ModuleType, *, is_async: bool, **options: Any) -> None:
        unknown = options.keys() - set(NETWORK)
        if unknown:
            raise TypeError(f"unexpected option {min(unknown)!r}; a mesh transport takes {', '.join(NETWORK)}")
        self._httpx = httpx
        self._stock = httpx.AsyncClient if is_async else httpx.Client
        self._options = options
        self._is_async = is_async
        self._clients: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self._trust_env = options.setdefault("trust_env", True)
        self._is_default = options.setdefault("verify", True) is True
        # What can be wrong in the arguments is found where they are given, as httpx does; only its own default has to wait.
        if options.get("cert") is not None or isinstance(options["verify"], str):
            verify = roots(httpx, trust_env=self._trust_env) if self._is_default else options["verify"]
            options["verify"] = httpx.create_ssl_context(verify=verify, cert=options.pop("cert", None))
            self._is_default = False
        if isinstance(options.get("proxy"), (str, httpx.URL)):
            options["proxy"] = httpx.Proxy(url=options["proxy"])
        if not options.get("http1", True) and not options.get("http2", False):
            raise ValueError("a client without http1 and http2 can't speak: leave one of them on.")

    @property
    def protocols(self) -> str:
        """What may be spoken, the preferred first, as ALPN writes it."""
        spoken = (("h2", self._options.get("http2", False)), ("http/1.1", self._options.get("http1", True)))
        return ",".join(name for name, is_on in spoken if is_on)

    def transport_for(self, url: Any) -> Any:
        """The transport that a stock client would take for this URL."""
        client = self._client()
        # As its `_transport_for_url` does, which a mocker may have replaced: the mesh's client has asked it already.
        for pattern, transport in client._mounts.items():
            if pattern.matches(url):
                return client._transport if transport is None else transport
        return client._transport

    def _client(self) -> Any:
        key = _running_loop() if self._is_async else None
        client = self._clients.get(key)
        if client is None:
            with self._lock:
                client = self._clients.get(key)
                if client is None:
                    self._bury()
                    client = self._clients[key] = self._stock(**self._settled())
        return client

    def _settled(self) -> dict[str, Any]:
        if self._is_default:
            # One context for the direct way and all proxies.
            self._options["verify"] = roots(self._httpx, trust_env=self._trust_env)
            self._is_default = False
        if self._options.get("http2") and self._options.get("http1", True) and importlib.util.find_spec("h2") is None:
            # The mesh speaks HTTP/2 by itself; that httpx needs a package for it is no reason to refuse the client.
            return {**self._options, "http2": False}
        return self._options

    def _bury(self) -> None:
        """What belongs to a closed loop can't be closed any more, only left."""
        for loop in [loop for loop in self._clients if loop is not None and loop.is_closed()]:
            del self._clients[loop]

    def close(self) -> None:
        client = self._clients.pop(None, None)
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close what was opened on the running loop."""
        self._bury()
        client = self._clients.pop(_running_loop(), None)
        if client is not None:
            await client.aclose()

    def forget(self) -> None:
        """In a forked child the parent's connections are the parent's."""
        self._clients = {}
        self._lock = threading.Lock()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """None where something else than asyncio runs: httpx's own transports know trio too."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
