"""Which SPIFFE IDs do the names of a file stand for?

Rules speak of services; the gate compares SPIFFE IDs. `meshlib dev` issues its certificates in a trust domain of its
own, so there the file's identities are carried over. Nothing is looked up: an ID follows from the file alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import document as doc
from .values import DEV_TRUST_DOMAIN, split_spiffe_id


@dataclass(frozen=True, slots=True)
class Names:
    """Which SPIFFE IDs the names of a document stand for.

    The certificates of `meshlib dev` are always at the default path, whatever the file says. Identities of foreign
    domains stay as they are and match nobody there.
    """

    document: doc.Document
    is_dev: bool

    @property
    def written_domain(self) -> str:
        return self.document.secure.trust_domain or f"{self.document.mesh}.internal"

    @property
    def trust_domain(self) -> str:
        return DEV_TRUST_DOMAIN if self.is_dev else self.written_domain

    def domain(self, written: str) -> str:
        """A trust domain; the file's own is in development the one of `meshlib dev`."""
        return self.trust_domain if written == self.written_domain else written

    def identity(self, service: str) -> str:
        """The SPIFFE ID of a service."""
        written = self.document.services[service].identity
        if written is not None and not self.is_dev:
            return written
        return f"spiffe://{self.trust_domain}/ns/{self.document.secure.namespace}/sa/{service}"

    def caller(self, written: str) -> str:
        """What a rule's `from` means: "*", a SPIFFE ID, or the beginning of SPIFFE IDs with `*`."""
        if written == "*":
            return written
        if not written.startswith("spiffe://"):
            return self.identity(written)
        if not self.is_dev:
            return written
        for service, settings in self.document.services.items():
            if settings.identity == written:
                return self.identity(service)
        domain, _, path = written.removeprefix("spiffe://").partition("/")
        return f"spiffe://{self.trust_domain}/{path}" if domain == self.written_domain else written

    def callers(self, written: Iterable[str], domains: Iterable[str] = ()) -> tuple[str, ...]:
        """The same for a list, each once; what begins with `*/` once for each of the trust domains that are written down."""
        spread = [f"spiffe://{domain}{item[1:]}" for item in written for domain in domains if item.startswith("*/")]
        whole = [item for item in written if not item.startswith("*/")]
        return tuple(dict.fromkeys(self.caller(item) for item in (*whole, *spread)))

    def endpoint(self, written: str | None) -> str | None:
        """The identity of an endpoint that differs from its service's; in development none does."""
        if written is None or self.is_dev:
            return None
        split_spiffe_id(written)
        return written
