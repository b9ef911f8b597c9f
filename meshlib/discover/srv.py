"""Where are they, by SRV records?

A name such as _http._tcp.orders.example lists targets with port, weight and priority (RFC 2782). Endpoints are the addresses of the
targets of the lowest priority that has any; a target's weight is divided among its addresses. The system's resolver can't ask for SRV, so
dnspython asks the name servers of /etc/resolv.conf, on the keeper's loop, and tells how long an answer may be kept: it is asked again
when that is over, after 5 s at most and 1 s at least. Records that say that there is none (NXDOMAIN) are kept like that too.

As with other names, what is negative or doesn't come is an error and no empty list. So it is with a single target: while it can't be
resolved, or its name server is silent, it keeps the addresses that it had, and the others are used. Only a target of "." says that there
is nothing, and is believed as far as `hold.py` lets it. It needs dnspython (`pip install 'meshlib-servicemesh[dns]'`), which is imported
when the first name is resolved.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from meshlib.errors import ConfigError

from .resolver import EndpointAddress, Snapshot

LEAST, MOST = 1.0, 5.0  # seconds between two looks
LIMIT = 5.0  # seconds for all questions of a look together
# Parts of it: for the records, then for the addresses. A target whose name server is silent costs its part and nothing more; and who
# starts has the addresses of the others within the 2 s that are waited for first answers.
RECORDS, ADDRESSES = 0.6, 0.3
# In the place of a weight of 0 beside others, which means "hardly ever".
HARDLY = 0.01


class Target(NamedTuple):
    priority: int
    weight: int
    port: int
    host: str


class SrvResolver:
    """The addresses of one Service behind SRV records. `nameservers` and `port` are for tests and for registries that speak DNS."""

    def __init__(
        self,
        service: str,
        name: str,
        *,
        nameservers: Sequence[str] = (),
        port: int = 53,
        limit: float = LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.service = service
        self.name = name
        self.interval: float | None = MOST
        self._nameservers = list(nameservers)
        self._port = port
        self._limit = limit
        self._clock = clock
        self._snapshot = Snapshot(service, 0, (), clock())
        self._known: dict[str, tuple[str, ...]] = {}  # addresses of each target
        _library()

    async def resolve(self) -> Snapshot:
        """Ask. Raises OSError for a negative answer or a broken server, TimeoutError when none came in time."""
        self.interval = MOST
        try:
            async with asyncio.timeout(self._limit):
                targets, addresses = await self._ask()
        except TimeoutError:
            raise TimeoutError(f"no answer for {self.name} within {self._limit:g} s") from None
        endpoints = tuple(sorted(_endpoints(targets, addresses), key=lambda endpoint: endpoint.address))
        if targets and not endpoints:
            raise OSError(f"none of the {len(targets)} targets of {self.name} has an address")
        self._known = {target.host: addresses[target.host] for target in targets if target.host in addresses}
        if endpoints == self._snapshot.endpoints:
            endpoints = self._snapshot.endpoints
        has_changed = endpoints is not self._snapshot.endpoints or not self._snapshot.version
        self._snapshot = Snapshot(self.service, self._snapshot.version + has_changed, endpoints, self._clock())
        return self._snapshot

    async def _ask(self) -> tuple[list[Target], dict[str, tuple[str, ...]]]:
        dns = _library()
        resolver = self._resolver(dns)
        answer = await self._query(resolver, self.name, "SRV", self._limit * RECORDS)
        found = [Target(row.priority, row.weight, row.port, row.target.to_text(omit_final_dot=True)) for row in answer]
        targets = [target for target in found if target.host not in (".", "")]
        ttls, addresses = [answer.rrset.ttl], _told_along(answer.response)
        missing = sorted({target.host for target in targets} - addresses.keys())
        kinds = ("A", "AAAA") if _has_ipv6() else ("A",)
        asked = [(host, kind) for host in missing for kind in kinds]
        limit = self._limit * ADDRESSES
        answers = await asyncio.gather(*(self._query(resolver, *each, limit) for each in asked), return_exceptions=True)
        for (host, _), each in zip(asked, answers, strict=True):
            if isinstance(each, BaseException):
                if not isinstance(each, OSError):
                    raise each
                continue
            ttls.append(each.rrset.ttl)
            addresses[host] = (*addresses.get(host, ()), *(row.address for row in each))
        for host in missing:
            if host not in addresses and host in self._known:
                addresses[host] = self._known[host]
        self.interval = min(MOST, max(LEAST, float(min(ttls))))
        return targets, addresses

    def _resolver(self, dns: Any) -> Any:
        try:
            resolver = dns.asyncresolver.Resolver(configure=not self._nameservers)
        except dns.resolver.NoResolverConfiguration as error:
            raise OSError(f"no name server is known: {error}") from None
        if self._nameservers:
            resolver.nameservers, resolver.port = self._nameservers, self._port
        # One that was lost is asked again, or of another server, while there is time.
        resolver.timeout = self._limit * RECORDS / 3
        return resolver

    async def _query(self, resolver: Any, name: str, kind: str, limit: float) -> Any:
        dns = _library()
        backend = dns.asyncbackend.get_backend("asyncio")
        try:
            return await resolver.resolve(name, kind, search=False, lifetime=limit, backend=backend)
        except dns.resolver.NXDOMAIN as error:
            self._keep_negative(dns, error.responses().values())
            raise OSError(f"{name} does not exist (NXDOMAIN)") from None
        except dns.resolver.NoAnswer as error:
            self._keep_negative(dns, [error.kwargs["response"]] if "response" in error.kwargs else [])
            raise OSError(f"{name} has no {kind} records") from None
        except dns.exception.Timeout:
            raise TimeoutError(f"no answer for {name} within {limit:g} s") from None
        except (dns.exception.DNSException, EOFError) as error:
            raise OSError(f"{name} can't be resolved: {error}") from None

    def _keep_negative(self, dns: Any, responses: Iterable[Any]) -> None:
        """Until when there is none, as its zone says (RFC 2308)."""
        for response in responses:
            for rrset in response.authority:
                if rrset.rdtype == dns.rdatatype.SOA:
                    self.interval = min(MOST, max(LEAST, float(min(rrset.ttl, rrset[0].minimum))))


def _endpoints(targets: Sequence[Target], addresses: dict[str, tuple[str, ...]]) -> list[EndpointAddress]:
    """Of the lowest priority that has any address. Where all weights are 0, all are alike."""
    for priority in sorted({target.priority for target in targets}):
        chosen = [target for target in targets if target.priority == priority and addresses.get(target.host)]
        if not chosen:
            continue
        is_weighted = any(target.weight for target in chosen)
        found: dict[str, float] = {}
        for target in chosen:
            weight = float(target.weight or HARDLY) if is_weighted else 1.0
            hosts = tuple(dict.fromkeys(addresses[target.host]))
            for host in hosts:
                at = f"[{host}]:{target.port}" if ":" in host else f"{host}:{target.port}"
                # Two targets may lead to the same place: it gets what both have.
                found[at] = found.get(at, 0.0) + (weight / len(hosts) if is_weighted else weight)
        return [EndpointAddress(address, weight) for address, weight in found.items()]
    return []


def _told_along(response: Any) -> dict[str, tuple[str, ...]]:
    """Addresses that came with the records."""
    dns = _library()
    kinds = (dns.rdatatype.A, dns.rdatatype.AAAA) if _has_ipv6() else (dns.rdatatype.A,)
    found: dict[str, tuple[str, ...]] = {}
    for rrset in response.additional:
        if rrset.rdtype in kinds:
            host = rrset.name.to_text(omit_final_dot=True)
            found[host] = (*found.get(host, ()), *(row.address for row in rrset))
    return found


def _has_ipv6() -> bool:
    """Is there a way to any address of IPv6? Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1", 53))
    except OSError:
        return False
    return True


def _library() -> Any:
    try:
        import dns
        import dns.asyncbackend
        import dns.asyncresolver
        import dns.exception
        import dns.rdatatype
        import dns.resolver
    except ImportError:
        raise ConfigError(
            "discover: SRV records are asked for with dnspython, which is not installed.",
            hint="pip install 'meshlib-servicemesh[dns]'",
        ) from None
    return dns
