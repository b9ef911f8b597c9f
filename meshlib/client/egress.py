"""How does a call leave for a host that is no Service, and may it?

What may leave is said by `EgressRules`. Under `egress: deny` only the hosts that are listed may be called: compared exactly, in lower
case and without a dot at the end; `*.example.com` stands for one label, as in a certificate, so that neither `example.com` nor
`a.b.example.com` is meant; an address must be listed itself. A redirect is another call, and is asked about again. A credential of
the configuration is put on a call to exactly its host, over TLS that verifies that host, and nowhere else: never to a Service, never
over http, and not to the place where a redirect leads. A header that the application wrote itself is left alone. The request that the
application holds stays without it, so that no log, error or span of its own can show it. On all calls that leave, `baggage`, the mesh's
own headers (`x-mesh-*`) and its member of `tracestate` are left out: they are for services of the mesh.

They leave by httpx's own transports, chosen as httpx would choose them: by proxy (its argument, HTTP_PROXY, HTTPS_PROXY,
ALL_PROXY, NO_PROXY), with its `verify`, `cert`, `http1`, `http2` and `limits`. A stock client is kept for that choice, and made when the
first call leaves, since an SSL context costs milliseconds and many processes never call outside. The roots are the platform's:
$SSL_CERT_FILE or $SSL_CERT_DIR (with `trust_env`), then the store that OpenSSL was built for, and httpx's own (certifi's) only where that
is empty. Answers and errors are httpx's own. Nothing here sees a call to a Service, so that no proxy variable can capture one.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .. import errors
from ..call import STATE
from ..observe.trace import BAGGAGE, TRACESTATE
from ..secure import files
from ..secure.files import Secret

if TYPE_CHECKING:
    from .way import OutboundWay

log = logging.getLogger("meshlib.egress")

Headers = list[tuple[bytes, bytes]]

# Options of an httpx client that are about the network: they belong to egress.
NETWORK = ("verify", "cert", "http1", "http2", "proxy", "limits", "trust_env")
# A folder of roots is looked up by these names, so that other files in it don't count.
_HASHED = re.compile(r"[0-9a-fA-F]{8}\.\d+")
# Seconds between two looks at the file of a credential.
LOOK: Final = 1.0
# What a header's value may hold (RFC 9110, 5.5), without what only looks like it.
_SENDABLE: Final = re.compile(rb"[\x21-\x7e\x80-\xff](?:[\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")
_STATE: Final = STATE.encode() + b"="


class Credential:
    """A header for calls to one host outside, with a value that is in the environment or in a file, and never shown.

    A file is read again when it has changed; while it can't be read, the last good value counts. `folders`: where it may lie, beside
    those where orchestrators put secrets.
    """

    __slots__ = ("_clock", "_folders", "_good", "_looked", "_mark", "env", "file", "header", "host", "prefix")

    def __init__(
        self,
        host: str,
        header: str,
        prefix: str = "",
        *,
        env: str = "",
        file: Path | None = None,
        folders: Sequence[Path] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host, self.header, self.prefix, self.env, self.file = plain_host(host), header.lower(), prefix, env, file
        self._folders = folders
        self._clock = clock
        self._good: bytes | None = None
        self._mark: tuple[int, int, int] | None = None
        self._looked = float("-inf")

    def value(self) -> Secret:
        """The whole value of the header. Raises `Refused` if there is none, or none that can be sent."""
        text = self._from_file() if self.file is not None else os.environ.get(self.env, "").strip().encode()
        value = Secret(self.prefix.encode("latin-1", "replace") + text)
        if not text or not _SENDABLE.fullmatch(value):
            what = "has control characters in it" if text else "is empty" if self.file else "is not set"
            raise self._missing(f"{self._source} {what}")
        return value

    @property
    def _source(self) -> str:
        return f"the file {self.file}" if self.file is not None else f"the environment variable {self.env}"

    def _from_file(self) -> bytes:
        assert self.file is not None
        now = self._clock()
        if self._good is not None and now - self._looked < LOOK:
            return self._good
        self._looked = now
        try:
            found = self.file.stat()
            mark = (found.st_mtime_ns, found.st_size, found.st_ino)
            if self._good is None or mark != self._mark:
                # Threads that come here at once read the same.
                self._good, self._mark = files.read_listed(self.file, self._folders), mark
                if not self._good:
                    log.warning("the credential for %s is empty now: %s", self.host, self._source)
        except (OSError, errors.MeshError) as error:
            why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            if self._good is None:
                raise self._missing(f"{self._source} can't be read: {why}") from None
            if self._mark is not None:
                self._mark = None  # told once, and read again when it is there
                log.warning("the credential for %s can't be read again, the last one stays in use: %s", self.host, why)
        return self._good

    def _missing(self, why: str) -> errors.Refused:
        return errors.Refused(
            f"the call to {self.host!r} needs the credential of mesh.yaml, and {why}.",
            hint=f"Nothing was sent. Provide it, or take {self.host} out of `egress.credentials`.",
            reason="egress.credential",
        )

    def __repr__(self) -> str:
        return f"<Credential for {self.host}: {self.header} from {self._source}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a credential can't be pickled or copied: it may hold a secret; make it from the configuration")


class EgressRules:
    """Which hosts outside may be called, and with which credentials. Immutable; a reload makes new ones."""

    __slots__ = ("_credentials", "_hosts", "_wildcards", "policy")

    def __init__(self, policy: str = "allow", hosts: Iterable[str] = (), credentials: Iterable[Credential] = ()) -> None:
        self.policy = policy
        written = [plain_host(host) for host in hosts]
        self._hosts = frozenset(host for host in written if not host.startswith("*."))
        self._wildcards = frozenset(host[2:] for host in written if host.startswith("*."))
        self._credentials: dict[str, list[Credential]] = {}
        for credential in credentials:
            self._credentials.setdefault(credential.host, []).append(credential)

    @classmethod
    def of(cls, config: Any) -> EgressRules:
        """Those of a `Config`."""
        folders = (config.file.parent,)
        credentials = [
            Credential(one.host, one.header, one.prefix, env=one.env, file=one.file, folders=folders)
            for one in config.egress_credentials
        ]
        return cls(config.egress, config.egress_hosts, credentials)

    def lets_out(self, host: str) -> bool:
        """May this host be called? It is no Service."""
        if self.policy != "deny":
            return True
        host = plain_host(host)
        if host in self._hosts:
            return True
        label, _, rest = host.partition(".")
        return bool(label) and rest in self._wildcards and not _is_address(host)

    def check(self, host: str) -> None:
        """Refuse what may not leave. A bare name is a Service that is missing, never a host outside."""
        if "." not in host and ":" not in host and host.lower() != "localhost":
            raise errors.UnknownService(
                f"no service is called {host!r}.", hint="Add it to mesh.yaml; a host outside the mesh needs a dot in its name."
            )
        if self.lets_out(host):
            return
        line = f"egress: {{policy: deny, hosts: [{json.dumps(plain_host(host))}]}}"
        if self._hosts or self._wildcards:
            line = f"{json.dumps(plain_host(host))}, under `hosts` of `egress`"
        raise errors.Denied(
            f"{host!r} is not a service, and egress is denied.",
            rule="egress: deny",
            hint=f"If it may be called, add it to mesh.yaml: {line}.",
        )

    def credentials_for(self, host: str) -> Sequence[Credential]:
        return self._credentials.get(plain_host(host), ()) if self._credentials else ()


def leave(way: OutboundWay, host: str) -> None:
    """A call goes to a host that is no Service: may it, and then it is counted."""
    check_egress(host, way.egress)
    if way.observer is not None:
        way.observer.egress(host)


def check_egress(host: str, egress: str | EgressRules) -> None:
    """Refuse what is no Service and may not leave."""
    rules_of(egress).check(host)


def rules_of(egress: str | EgressRules) -> EgressRules:
    """The word `allow` or `deny` as rules without a list."""
    return _WORDS[egress] if isinstance(egress, str) else egress


def dressed(rules: str | EgressRules, scheme: str, host: str, headers: Headers, *, is_verified: bool = True) -> Headers:
    """The headers with which a call leaves for a host outside; the same list if nothing has to be changed.

    `is_verified`: TLS proves that the other side is this host. Raises `Refused` where a credential can't be had.
    """
    if any(_is_inner(name, value) for name, value in headers):
        kept = ((name, _without_state(value) if name.lower() == TRACESTATE else value) for name, value in headers)
        headers = [(name, value) for name, value in kept if not _stays(name) and (value or name.lower() != TRACESTATE)]
    credentials = rules_of(rules).credentials_for(host)
    if not credentials or scheme not in ("https", "wss"):
        return headers
    if not is_verified:
        log.warning(
            "no credential was sent to %s: nothing proves that it is %s (verify=False, or another sni_hostname)", host, host
        )
        return headers
    present = {name.lower() for name, _ in headers}
    added = [one for one in credentials if one.header.encode() not in present]
    return [*headers, *((one.header.encode(), one.value()) for one in added)]


class SecretText(str):
    """A text that doesn't show itself in a repr, as `Secret` for those that take no bytes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<secret, {len(self)} characters>"


def departure(
    way: OutboundWay, scheme: str, host: str, headers: Iterable[tuple[str, str]], *, is_verified: bool = True
) -> list[tuple[str, str]]:
    """`leave` and `dressed` for those that keep headers as text: what stands in for httpx."""
    leave(way, host)
    given = [(name.encode("latin-1", "replace"), value.encode("latin-1", "replace")) for name, value in headers]
    return [
        (name.decode("latin-1"), (SecretText if isinstance(value, Secret) else str)(value.decode("latin-1")))
        for name, value in dressed(way.egress, scheme, host, given, is_verified=is_verified)
    ]


def plain_host(host: str) -> str:
    """A host as it is compared: lower case, without the dot at its end; an address in its one canonical form."""
    host = host.lower().removeprefix("[").removesuffix("]").removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _stays(name: bytes) -> bool:
    """Headers that are for services of the mesh only."""
    lower = name.lower()
    return lower == BAGGAGE or lower.startswith(b"x-mesh-")


def _is_inner(name: bytes, value: bytes) -> bool:
    return _stays(name) or (name.lower() == TRACESTATE and _STATE in value)


def _without_state(value: bytes) -> bytes:
    members = [member for member in value.split(b",") if not member.strip(b" \t").startswith(_STATE)]
    return b",".join(members).strip(b" \t")


_WORDS: Final = {"allow": EgressRules("allow"), "deny": EgressRules("deny")}


def roots(httpx: ModuleType, *, trust_env: bool = True) -> ssl.SSLContext:
    """A context that trusts whom the platform trusts, for the names in a certificate's SAN and for no others."""
    context = _platform(httpx, trust_env=trust_env)
    # The common name is no host name any more (RFC 9525 section 6.3), and the keys of sessions are nobody's to write down.
    context.hostname_checks_common_name = False
    context.keylog_filename = None  # type: ignore[assignment]  # None is how it is switched off
    return context


def _platform(httpx: ModuleType, *, trust_env: bool) -> ssl.SSLContext:
    if trust_env and (file := os.environ.get("SSL_CERT_FILE")):
        return _trusting(file, None)
    if trust_env and (folder := os.environ.get("SSL_CERT_DIR")):
        return _trusting(None, folder)
    # What OpenSSL was built for, and not `load_default_certs`, which reads the variables whatever `trust_env` says.
    paths = ssl.get_default_verify_paths()
    store = paths.openssl_cafile if Path(paths.openssl_cafile).is_file() else None
    folder = paths.openssl_capath if _has_roots(paths.openssl_capath) else None
    if store is not None or folder is not None:
        context = _trusting(store, folder)
        if folder is not None or context.cert_store_stats()["x509_ca"]:
            return context
    default: ssl.SSLContext = httpx.create_ssl_context(trust_env=False)
    return default


def _trusting(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Not by `create_default_context`, which opens the file that SSLKEYLOGFILE names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=file, capath=folder)
    return context


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

    @property
    def is_verifying(self) -> bool:
        """Is the other side of a TLS connection who its URL says?"""
        verify = self._options["verify"]
        if isinstance(verify, ssl.SSLContext):
            return verify.verify_mode is ssl.CERT_REQUIRED and verify.check_hostname
        return verify is not False

    def dressed(self, rules: str | EgressRules, request: Any) -> Any:
        """The request as it leaves: itself, or another in its place, since the application and its redirects keep this one."""
        given, url = request.headers.raw, request.url
        host, server = url.raw_host.decode("ascii"), request.extensions.get("sni_hostname")
        is_verified = self.is_verifying and (server is None or server == host)
        headers = dressed(rules, url.scheme, host, given, is_verified=is_verified)
        if headers is given:
            return request
        return self._httpx.Request(request.method, url, headers=headers, stream=request.stream, extensions=request.extensions)

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
