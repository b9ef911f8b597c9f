"""Does a service stand up with what Kubernetes, cert-manager or Docker has mounted, and follow when it is turned?"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from meshlib.errors import KeyFileError
from meshlib.secure import CertificateAuthority, IdentityStore, MountedSource, bundle, certificates
from meshlib.testing import check_identity_source
from meshlib.testing import identity as conformance

ID = "spiffe://shop.internal/ns/default/sa/orders"


class Mount:
    """A Secret as the kubelet mounts it: files behind links, all of them turned at once."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.where.mkdir(parents=True, exist_ok=True)
        self.where.chmod(0o1777)
        self.turns = 0

    def turn(self, **contents: bytes) -> None:
        """tls_crt becomes tls.crt."""
        self.turns += 1
        fresh = self.where / f"..2024_{self.turns}"
        fresh.mkdir(mode=0o755)
        for name, content in contents.items():
            path = fresh / name.replace("_", ".")
            path.write_bytes(content)
            path.chmod(0o440 if "key" in name else 0o644)
            link = self.where / path.name
            if not link.is_symlink():
                link.symlink_to(f"..data/{path.name}")
        before = (self.where / "..data").resolve()
        (self.where / "..data_tmp").symlink_to(fresh.name)
        (self.where / "..data_tmp").rename(self.where / "..data")
        if self.turns > 1:
            shutil.rmtree(before)

    def publish(self, chain: bytes, key: bytes, roots: bytes) -> None:
        self.turn(tls_crt=chain, tls_key=key, ca_crt=roots)

    def source(self, spiffe_id: str = ID, **more: Any) -> MountedSource:
        paths = (self.where / name for name in ("tls.crt", "tls.key", "ca.crt"))
        return MountedSource(*paths, spiffe_id, **more)

    def issue(self, authority: CertificateAuthority) -> str:
        issued = authority.issue("orders", ttl=3600.0)
        self.publish(issued.chain, issued.key, issued.bundle)
        return issued.serial


@pytest.fixture
def authority() -> CertificateAuthority:
    return CertificateAuthority.create(None, "shop.internal")


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    return Mount(tmp_path / "tls")


def test_mounted_source_conforms(tmp_path: Path) -> None:
    """To all that is asked of every source."""

    class World(Mount):
        def __init__(self, spiffe_id: str) -> None:
            super().__init__(tmp_path / str(len(list(tmp_path.iterdir()))))

        def source(self, spiffe_id: str = conformance.SPIFFE_ID, **more: Any) -> MountedSource:
            return super().source(spiffe_id, **more)

        def close(self) -> None:
            pass

    assert check_identity_source(World) == [rule.__name__ for rule in conformance.RULES]


def test_mount_that_is_turned_is_followed(mount: Mount, authority: CertificateAuthority) -> None:
    """The old folder is gone by then; the new certificate is in force with the next look."""
    first = mount.issue(authority)
    store = IdentityStore(mount.source(), mode="enforce")
    assert store.require(0.0).serial == first
    assert store.refresh(1.0) is False
    second = mount.issue(authority)
    assert (store.refresh(2.0), store.current.serial if store.current else "", store.failures) == (True, second, 0)


def test_pair_is_of_one_moment_while_the_mount_is_turned(mount: Mount, authority: CertificateAuthority) -> None:
    """Whenever a reader looks, he finds a whole pair, and no failure is told: the atomic step is Kubernetes'."""
    mount.issue(authority)
    source, is_over, faults = mount.source(), threading.Event(), list[str]()

    def read() -> None:
        while not is_over.is_set():
            try:
                identity = source.load()
                leaf = x509.load_pem_x509_certificate(identity.chain)
                assert load_pem_private_key(identity.key, None).public_key() == leaf.public_key()
            except Exception as error:
                faults.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(60):
        last = mount.issue(authority)
    is_over.set()
    reader.join()
    assert (faults, source.load().serial) == ([], last)


def test_certificate_and_key_may_stand_in_one_file(tmp_path: Path, authority: CertificateAuthority) -> None:
    """As SPIFFE's credential bundles and many tools write them; the chain that peers get has no key in it."""
    issued = authority.issue("orders", ttl=3600.0)
    (tmp_path / "credential-bundle.pem").write_bytes(issued.key + issued.chain)
    (tmp_path / "credential-bundle.pem").chmod(0o600)
    (tmp_path / "ca.crt").write_bytes(issued.bundle)
    both = tmp_path / "credential-bundle.pem"
    identity = MountedSource(both, both, tmp_path / "ca.crt", ID).load()
    assert (identity.chain, type(identity.chain)) == (issued.chain, bytes)
    both.chmod(0o644)
    with pytest.raises(KeyFileError, match="may be opened by other users"):
        MountedSource(both, both, tmp_path / "ca.crt", ID).load()


def test_key_of_cert_manager_is_taken(mount: Mount, authority: CertificateAuthority) -> None:
    """PKCS#1 and SEC1, not only PKCS#8."""
    issued = authority.issue("orders", ttl=3600.0)
    key = load_pem_private_key(issued.key, None)
    old = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    assert old.startswith(b"-----BEGIN EC PRIVATE KEY-----")
    mount.publish(issued.chain, old, issued.bundle)
    assert IdentityStore(mount.source(), mode="enforce").require(0.0).serial == issued.serial


def test_bundle_may_be_a_spiffe_bundle_in_another_mount(mount: Mount, tmp_path: Path, authority: CertificateAuthority) -> None:
    """trust-manager has its own ConfigMap for it."""
    mount.issue(authority)
    other = Mount(tmp_path / "roots")
    other.turn(bundle_json=bundle.format(bundle.parse(authority.bundle)))
    source = MountedSource(mount.where / "tls.crt", mount.where / "tls.key", other.where / "bundle.json", ID)
    assert source.load().bundles == {"shop.internal": authority.bundle}


def test_revocations_are_read_where_they_are_configured(mount: Mount, authority: CertificateAuthority) -> None:
    """There they must be: at the start a missing list is a fault, later the last good one stays and is noted."""
    mount.issue(authority)
    source = mount.source(crl=mount.where / "crl.pem")
    with pytest.raises(KeyFileError, match=r"crl\.pem does not exist"):
        source.load()
    root: Any = authority._roots.signing
    crl = certificates.pem(certificates.new_crl(root.certificate, root.key, [], 3600.0, 1.8e9, 1))
    (mount.where / "crl.pem").write_bytes(crl)
    assert source.load().crls == {"shop.internal": crl}
    (mount.where / "crl.pem").unlink()
    found = source.load()
    assert (found.crls, [note.split(":")[0] for note in found.notes]) == (
        {"shop.internal": crl},
        ["the last good list of revocations stays in force"],
    )


def test_secret_with_the_default_mode_is_refused_with_the_way_out(mount: Mount, authority: CertificateAuthority) -> None:
    """Kubernetes makes 0644 of it unless it is told otherwise, Docker 0444."""
    mount.issue(authority)
    (mount.where / "..data" / "tls.key").chmod(0o644)
    with pytest.raises(KeyFileError, match=r"tls\.key may be opened by other users .*mode 0644.*defaultMode: 0400.*Docker"):
        mount.source().load()


def test_last_good_identity_survives_a_mount_that_is_emptied(mount: Mount, authority: CertificateAuthority) -> None:
    """A Secret that was deleted, or a node that unmounts: the process goes on with what it has, and tells."""
    mount.issue(authority)
    store = IdentityStore(mount.source(), mode="enforce")
    first = store.require(0.0)
    shutil.rmtree(mount.where)
    assert (store.refresh(1.0), store.current, store.failures) == (False, first, 1)
    assert "does not exist" in str(store.last_error)
