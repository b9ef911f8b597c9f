"""Is this a source of identities that one can stand up with?

`check_identity_source(make)` asks a source of yours what every source of meshlib's own is asked: that it answers an identity
whole or not at all, sees changes, answers the same object while nothing changes, hands out no half of a pair to any thread, and
never shows a key. `make(spiffe_id)` gives a `World`: the outside system as a test fills it, and the source that looks at it.

    class Mine:
        def __init__(self, spiffe_id): ...
        def publish(self, chain, key, bundle): ...       # put these where the source finds them
        def source(self): return MySource(...)           # a new one, which has seen nothing yet
        def close(self): ...

    def test_my_source_conforms():
        check_identity_source(Mine)

Each rule is a function below, and begins with a world of its own. Bad parts may be answered by an exception or, where the source
has had good ones before, by these; a source that hears of changes later than they happen is given some seconds. A system that
makes its own certificates can't publish what a test gives it: its `publish` raises NotImplementedError, and what needs it is left
out. It does not check how a source gets on with the store; that is the store's business, whatever the source does.
"""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ..errors import MeshError
from ..secure import CertificateAuthority, Identity, IdentitySource, certificates

TRUST_DOMAIN: Final = "conformance.internal"
SPIFFE_ID: Final = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/checked"
ROTATIONS: Final = 20
THREADS: Final = 8
# What the store's keeper can bear each second, for a source that doesn't say when it is to be asked.
QUICK: Final = 0.25

Parts = tuple[bytes, bytes, bytes]


class World(Protocol):
    """An outside system that holds an identity, and the source under test that looks at it."""

    def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
        """Put chain, key and bundle (PEM) where the source finds them, in place of what is there. May be seen a little later."""
        ...

    def source(self) -> IdentitySource:
        """A new source, which has not looked yet."""
        ...

    def close(self) -> None:
        """The rule is over: end what was started."""
        ...


def check_identity_source(make: Callable[[str], World], *, patience: float = 5.0) -> list[str]:
    """Check a source by all rules; the names of those that were checked. Raises AssertionError with the rule that is broken."""
    if not __debug__:
        raise RuntimeError("rules are checked by `assert`, which python -O leaves out: run it without -O")
    checked = []
    for rule in RULES:
        world = make(SPIFFE_ID)
        bench = Bench(world, patience)
        try:
            rule(bench)
        except NotImplementedError:
            continue
        except AssertionError as error:
            raise AssertionError(f"{rule.__name__}: {error}\n    {rule.__doc__}") from error
        finally:
            bench.close()
            world.close()
        checked.append(rule.__name__)
    assert checked, "no rule could be checked: does `source()` raise NotImplementedError?"
    return checked


class Bench:
    """A world with a CA, for one rule."""

    def __init__(self, world: World, patience: float) -> None:
        self.world = world
        self.patience = patience
        self.shift = 0.0
        self._open: Any = None
        self.authority = CertificateAuthority.create(None, TRUST_DOMAIN, clock=self.clock)

    def clock(self) -> float:
        return time.time() + self.shift

    def source(self) -> IdentitySource:
        """A new source; the last one is closed, if it can be."""
        self.close()
        self._open = self.world.source()
        return self._open  # type: ignore[no-any-return]

    def close(self) -> None:
        if hasattr(self._open, "close"):
            self._open.close()

    def good(self) -> Parts:
        issued = self.authority.issue("checked", ttl=3600.0)
        return issued.chain, issued.key, issued.bundle

    def publish(self, parts: Parts) -> Parts:
        self.world.publish(*parts)
        return parts

    def begin(self) -> None:
        """Something good is there: ours, or the system's own."""
        try:
            self.publish(self.good())
        except NotImplementedError:
            pass

    def first(self, source: IdentitySource) -> Identity:
        """What it answers first, which must be good."""
        return self.until(source, lambda _: True)

    def until(
        self, source: IdentitySource, is_it: Callable[[Identity], bool], allowed: Callable[[Identity], bool] = lambda _: True
    ) -> Identity:
        """Load until the answer is the one; every answer before must be allowed, and every exception a MeshError."""
        end, found = time.monotonic() + self.patience, None
        while True:
            identity, found = load(source)
            if identity is not None:
                check_whole(identity)
                if is_it(identity):
                    return identity
                assert allowed(identity), f"it answered {identity!r}, which must not be used"
            late = f"the last answer was {identity!r}" if found is None else f"the last error was: {found}"
            assert time.monotonic() < end, f"nothing came within {self.patience:g} s; {late}"
            time.sleep(0.01)


def load(source: IdentitySource) -> tuple[Identity | None, MeshError | None]:
    """What it answers, or the error that it raises, which must be one of ours."""
    error: MeshError | None = None
    try:
        return source.load(), None
    except MeshError as caught:
        error = caught
    except Exception as caught:
        raise AssertionError(f"it raised {type(caught).__name__}, which is no MeshError") from caught
    assert error.message, "its error says nothing"
    assert error.hint, f"its error doesn't say what to do: {error.message}"
    return None, error


def check_whole(identity: Identity) -> None:
    """All parts are there, and they belong together."""
    leaf = x509.load_pem_x509_certificate(identity.chain)
    assert type(identity.chain) is bytes and type(identity.key) is bytes, "chain and key must be plain bytes: TLS takes no others"
    assert b"PRIVATE" not in identity.chain, "the chain, which is shown to peers, holds a private key"
    assert load_pem_private_key(identity.key, None).public_key() == leaf.public_key(), "the key is not that of the certificate"
    assert certificates.uris_of(leaf) == [identity.spiffe_id], "spiffe_id is not that of the certificate"
    assert identity.spiffe_id.startswith(f"spiffe://{identity.trust_domain}/"), "the ID is not one of a workload"
    assert identity.serial == certificates.serial_of(leaf), "serial is not that of the certificate"
    life = (leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp())
    assert (identity.not_before, identity.not_after) == life, "the times are not those of the certificate"
    assert life[0] <= time.time() < life[1], "the certificate is not valid now"
    assert not certificates.flaw_of_leaf(leaf), "the certificate is no X.509-SVID"
    for name, pem in identity.bundles.items():
        roots = x509.load_pem_x509_certificates(pem)
        named = {certificates.trust_domain_of(uri) for root in roots for uri in certificates.uris_of(root)}
        assert named <= {name}, f"the bundle of {name} holds a root of {named - {name}}"
    assert identity.trust_domain in identity.bundles, "there is no bundle of our own trust domain"
    assert identity.generation == 0, "generations are counted by the store"


# ---------------------------------------------------------------------------------------------------- the rules


def a_good_identity_is_answered_whole(bench: Bench) -> None:
    """Chain, key and bundle as they were published, of the ID that was asked for, with serial and times."""
    bench.begin()
    identity = bench.first(bench.source())
    assert identity.spiffe_id == SPIFFE_ID, f"it answered {identity.spiffe_id}"


def an_unchanged_identity_is_the_same_object(bench: Bench) -> None:
    """The store asks each second, and compares."""
    bench.begin()
    source = bench.source()
    first = bench.first(source)
    assert all(source.load() is first for _ in range(5)), "it answered a new object although nothing had changed"


def an_answer_is_quick(bench: Bench) -> None:
    """It is asked each second, on the thread that does all control work. One that renews says when it is to be asked."""
    bench.begin()
    source = bench.source()
    bench.first(source)
    times = []
    for _ in range(5):
        began = time.monotonic()
        source.load()
        times.append(time.monotonic() - began)
    assert hasattr(source, "refresh_at") or sorted(times)[2] < QUICK, f"load() takes {sorted(times)[2]:.2f} s"


def a_source_that_renews_says_when(bench: Bench) -> None:
    """`refresh_at`, where it is there, is a time before the certificate's end."""
    bench.begin()
    source: Any = bench.source()
    identity = bench.first(source)
    if hasattr(source, "refresh_at"):
        due = source.refresh_at(identity, time.time())
        assert isinstance(due, float | int) and due < identity.not_after, f"refresh_at answers {due!r}"


def nothing_there_is_an_error(bench: Bench) -> None:
    """One that says what to do, and nothing made up."""
    bench.publish(bench.good())  # raises where nothing can be published: then something is always there
    bench.publish((b"", b"", b""))
    identity, error = load(bench.source())
    assert identity is None and error is not None, "it answered an identity that nobody gave"


def a_new_certificate_is_seen(bench: Bench) -> None:
    """With its own key, and never with the old one's."""
    bench.publish(bench.good())
    source = bench.source()
    first = bench.first(source)
    chain, key, _ = bench.publish(bench.good())
    second = bench.until(source, lambda identity: identity.serial != first.serial, lambda identity: identity == first)
    assert second is not first
    assert x509.load_pem_x509_certificate(second.chain) == x509.load_pem_x509_certificate(chain)
    public = load_pem_private_key(second.key, None).public_key()
    assert public == load_pem_private_key(key, None).public_key()


def a_changed_bundle_is_seen(bench: Bench) -> None:
    """Although the certificate is the same: a root may have been withdrawn."""
    chain, key, _ = bench.publish(bench.good())
    source = bench.source()
    first = bench.first(source)
    bench.authority.begin_rotation()
    bench.publish((chain, key, bench.authority.bundle))
    second = bench.until(source, lambda identity: len(roots_of(identity)) == 2)
    assert (second.serial, len(roots_of(first))) == (first.serial, 1), "an identity that was answered must not change afterwards"


def what_is_bad_is_never_answered(bench: Bench) -> None:
    """Neither at the start nor after a good one; and what is good again is seen again."""
    for name, spoil in BAD.items():
        try:
            bad = spoil(bench)
            bench.publish(bad)
            identity, error = load(bench.source())
            assert identity is None and error is not None, "a new source answered it"
            good = bench.publish(bench.good())
            source = bench.source()
            first = bench.until(source, lambda identity, good=good: serial_of(good) == identity.serial)  # type: ignore[misc]
            bench.publish(bad)
            end = time.monotonic() + min(bench.patience, 0.2)
            while time.monotonic() < end:
                identity, error = load(source)
                assert identity is None or identity == first, "it was answered after a good one"
                if error is not None:
                    break
                time.sleep(0.01)
            again = bench.publish(bench.good())
            bench.until(
                source,
                lambda identity, again=again: serial_of(again) == identity.serial,  # type: ignore[misc]
                lambda identity, first=first: identity == first,  # type: ignore[misc]
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def no_thread_gets_half_of_a_pair(bench: Bench) -> None:
    """While certificates are replaced, and whoever asks."""
    bench.publish(bench.good())
    source = bench.source()
    bench.first(source)
    faults: list[BaseException] = []
    is_over = threading.Event()

    def ask() -> None:
        try:
            while not is_over.is_set():
                identity, _ = load(source)
                if identity is not None:
                    check_whole(identity)
        except BaseException as error:
            faults.append(error)

    with running(ask, THREADS, is_over):
        for _ in range(ROTATIONS):
            last = bench.publish(bench.good())
        if not faults:
            bench.until(source, lambda identity: identity.serial == serial_of(last))
    assert not faults, str(faults[0])


def a_key_is_never_shown(bench: Bench) -> None:
    """Not by the repr of the source or the identity, and not by an error."""
    try:
        parts = bench.publish(bench.good())
    except NotImplementedError:
        parts = None
    source = bench.source()
    identity = bench.first(source)
    shown = f"{source!r} {source!s} {identity!r} {identity!s} {[identity]!r}"
    keys = [identity.key]
    if parts is not None:
        chain, key, bundle = bench.good()
        keys += [parts[1], key]
        # Half of the new key is something that an error would like to quote.
        bench.publish((chain, key[: len(key) // 2] + b"\n", bundle))
        for _ in range(20):
            _, error = load(source)
            if error is not None:
                shown += f" {error!r} {error!s} {error.args!r} {vars(error)!r} {error.__cause__!r}"
            time.sleep(0.01)
    lines = {line[:40].decode() for key in keys for line in key.splitlines() if len(line) > 40 and b"-----" not in line}
    assert not any(line in shown for line in lines), "a line of the private key was shown"
    assert "PRIVATE KEY" not in shown, "a private key was shown"


def an_identity_is_never_pickled(bench: Bench) -> None:
    """Nor copied: caches and crash reporters would carry the key along."""
    bench.begin()
    identity = bench.first(bench.source())
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        try:
            way(identity)
        except TypeError:
            continue
        raise AssertionError(f"{way.__name__} made a copy of the private key")


RULES: Final = (
    a_good_identity_is_answered_whole,
    an_unchanged_identity_is_the_same_object,
    an_answer_is_quick,
    a_source_that_renews_says_when,
    nothing_there_is_an_error,
    a_new_certificate_is_seen,
    a_changed_bundle_is_seen,
    what_is_bad_is_never_answered,
    no_thread_gets_half_of_a_pair,
    a_key_is_never_shown,
    an_identity_is_never_pickled,
)

# ---------------------------------------------------------------------------------------------------- what is bad


def _of_another_key(bench: Bench) -> Parts:
    chain, _, bundle = bench.good()
    return chain, bench.good()[1], bundle


def _of_another_service(bench: Bench) -> Parts:
    issued = bench.authority.issue("other", ttl=3600.0)
    return issued.chain, issued.key, issued.bundle


def _of_another_trust_domain(bench: Bench) -> Parts:
    issued = CertificateAuthority.create(None, f"not.{TRUST_DOMAIN}").issue("checked", ttl=3600.0)
    return issued.chain, issued.key, issued.bundle


def _with_a_foreign_root(bench: Bench) -> Parts:
    chain, key, bundle = bench.good()
    return chain, key, bundle + CertificateAuthority.create(None, f"not.{TRUST_DOMAIN}").bundle


def _at(bench: Bench, shift: float) -> Parts:
    bench.shift = shift
    try:
        return bench.good()
    finally:
        bench.shift = 0.0


def _of_a_ca(bench: Bench) -> Parts:
    key = certificates.new_key()
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SPIFFE_ID)])
    root = certificates.new_root(key, TRUST_DOMAIN, 3600.0, time.time())
    builder = x509.CertificateBuilder().subject_name(root.subject).issuer_name(root.subject).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(root.not_valid_before_utc).not_valid_after(root.not_valid_after_utc)
    builder = builder.add_extension(names, critical=True).add_extension(x509.BasicConstraints(True, None), critical=True)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage).value
    leaf = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    return certificates.pem(leaf), certificates.key_pem(key), bench.authority.bundle


def _with_an_encrypted_key(bench: Bench) -> Parts:
    chain, key, bundle = bench.good()
    secret = serialization.BestAvailableEncryption(b"x")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return chain, load_pem_private_key(key, None).private_bytes(pem, pkcs8, secret), bundle


def _with(index: int, content: bytes) -> Callable[[Bench], Parts]:
    def spoil(bench: Bench) -> Parts:
        parts = list(bench.good())
        parts[index] = content or parts[index][: len(parts[index]) // 3]
        return parts[0], parts[1], parts[2]

    return spoil


BAD: Final[dict[str, Callable[[Bench], Parts]]] = {
    "the key of another certificate": _of_another_key,
    "the certificate of another service": _of_another_service,
    "the certificate of another trust domain": _of_another_trust_domain,
    "a bundle with a root of another trust domain": _with_a_foreign_root,
    "a certificate that has expired": lambda bench: _at(bench, -7200.0),
    "a certificate that is not valid yet": lambda bench: _at(bench, 7200.0),
    "the certificate of a CA": _of_a_ca,
    "a key that is encrypted": _with_an_encrypted_key,
    "a certificate that was cut off": _with(0, b""),
    "a key that was cut off": _with(1, b""),
    "a bundle that was cut off": _with(2, b""),
    "something else instead of a certificate": _with(
        0, b"-----BEGIN CERTIFICATE-----\nbm90aGluZw==\n-----END CERTIFICATE-----\n"
    ),
    "something else instead of a key": _with(1, b"no key"),
    "something else instead of a bundle": _with(2, b"{}"),
}


def serial_of(parts: Parts) -> str:
    return certificates.serial_of(x509.load_pem_x509_certificate(parts[0]))


def roots_of(identity: Identity) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(identity.bundles[identity.trust_domain])


@contextmanager
def running(work: Callable[[], None], count: int, is_over: threading.Event) -> Iterator[None]:
    """So many threads, to the end of the block."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
