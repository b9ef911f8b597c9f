"""Who may ask etcd, over what, and how does a configuration come from there? A real etcd with its own users and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from meshlib_etcd import EtcdError, EtcdSource, open_config, open_registry
from meshlib_etcd.messages import DENIED, INVALID

import meshlib
from integrations.etcd.tests.cluster import Etcd, text, until, watching
from meshlib.discover import Instance

pytestmark = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed")
A, B = "10.0.0.1:8443", "10.0.0.2:8443"
KEY = "/meshlib/config/mesh.yaml"


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    made = Etcd(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture
def password(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text("open sesame\n")
    return file


def lock(etcd: Etcd, user: str = "mesh", prefix: str = "/meshlib/", end: str = "/meshlib0") -> None:
    """Switch etcd's own authorisation on: only `root`, and `user` under the prefix."""
    for name, role in (("root", "root"), (user, "mesh")):
        etcd.ask("auth/user/add", {"name": name, "password": "open sesame"})
        etcd.ask("auth/role/add", {"name": role})
        etcd.ask("auth/user/grant", {"user": name, "role": role})
    permission = {"permType": "READWRITE", "key": text(prefix), "range_end": text(end)}
    etcd.ask("auth/role/grant", {"name": "mesh", "perm": permission})
    etcd.ask("auth/enable", {})


def as_root(etcd: Etcd) -> str:
    return str(etcd.ask("auth/authenticate", {"name": "root", "password": "open sesame"})["token"])


# ---------------------------------------------------------------- users


async def test_user_sees_and_enters_what_it_may(etcd: Etcd, password: Path) -> None:
    """By name and password; without them, or for more, etcd says no in words."""
    etcd.instance("orders", "a", A)
    lock(etcd)
    made = open_registry({"url": etcd.url, "user": "mesh", "password": {"file": str(password)}})
    registration = made.register(Instance("orders", "b", B), {})
    async with watching(made.resolver("orders", {})) as (seen,):
        await until(lambda: seen.addresses, [A])
        keeping = asyncio.create_task(registration.keep())
        await until(lambda: seen.addresses, [A, B])
        keeping.cancel()
        await registration.leave()
        await until(lambda: seen.addresses, [A])
    assert seen.errors == []
    await made.close()
    for settings, code in (
        ({}, INVALID),
        ({"user": "mesh", "password": {"file": str(password)}, "prefix": "/elsewhere/"}, DENIED),
    ):
        other = open_registry({"url": etcd.url, **settings})
        with pytest.raises(EtcdError) as told:
            await other.resolver("orders", {}).resolve()
        assert told.value.code == code
        await other.close()


async def test_wrong_password_is_told_and_a_right_one_counts_at_once(etcd: Etcd, password: Path) -> None:
    """It is read when it is needed."""
    etcd.instance("orders", "a", A)
    lock(etcd)
    password.write_text("wrong")
    made = open_registry({"url": etcd.url, "user": "mesh", "password": {"file": str(password)}})
    async with watching(made.resolver("orders", {})) as (seen,):
        await until(lambda: bool(seen.errors))
        assert "authentication failed" in str(seen.errors[0])
        password.write_text("open sesame")
        await until(lambda: seen.addresses, [A])
    await made.close()


async def test_token_that_ended_is_renewed(tmp_path: Path, password: Path) -> None:
    """By time, by a restart of etcd, and when somebody changes the users."""
    etcd = Etcd(tmp_path, "--auth-token-ttl", "1")
    try:
        etcd.start()
        etcd.instance("orders", "a", A)
        lock(etcd)
        made = open_registry({"url": etcd.url, "user": "mesh", "password": {"file": str(password)}})
        resolver, client = made.resolver("orders", {}), made._client
        assert len((await resolver.resolve()).endpoints) == 1
        first = client._token
        await asyncio.sleep(3)
        assert len((await resolver.resolve()).endpoints) == 1
        assert client._token not in (first, None, "")
        etcd.kill()
        etcd.start()
        assert len((await resolver.resolve()).endpoints) == 1
        etcd.ask("auth/user/add", {"name": "more", "password": "x"}, as_root(etcd))
        assert len((await resolver.resolve()).endpoints) == 1
        client._token = "a-token-that-ended.7"
        assert len((await resolver.resolve()).endpoints) == 1
        await made.close()
    finally:
        etcd.kill()


async def test_password_of_an_etcd_that_wants_none_does_no_harm(etcd: Etcd, password: Path) -> None:
    """It may be switched on there later."""
    etcd.instance("orders", "a", A)
    made = open_registry({"url": etcd.url, "user": "mesh", "password": {"file": str(password)}})
    resolver = made.resolver("orders", {})
    assert len((await resolver.resolve()).endpoints) == 1
    lock(etcd)
    assert len((await resolver.resolve()).endpoints) == 1
    assert made._client._token
    await made.close()


# ---------------------------------------------------------------- TLS


def certify(folder: Path, name: str, issuer: tuple[x509.Certificate, Any] | None = None) -> tuple[x509.Certificate, Any]:
    """A CA without an issuer, else a certificate for 127.0.0.1 that serves and calls."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        made = made.add_extension(names, critical=False).add_extension(both, critical=False)
    certificate = made.sign(key if issuer is None else issuer[1], hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, key


async def test_tls_on_both_sides(tmp_path: Path) -> None:
    """Only who knows etcd's CA believes it, and only whom etcd's CA knows is let in. A new certificate counts without a restart."""
    ca, other = certify(tmp_path, "ca"), certify(tmp_path, "other")
    certify(tmp_path, "etcd", ca)
    certify(tmp_path, "me", ca)
    certify(tmp_path, "stranger", other)
    options = (
        "--cert-file",
        f"{tmp_path}/etcd.pem",
        "--key-file",
        f"{tmp_path}/etcd.key",
        "--trusted-ca-file",
        f"{tmp_path}/ca.pem",
    )
    etcd = Etcd(tmp_path, *options, "--client-cert-auth", scheme="https")
    mine = {"verify": f"{tmp_path}/ca.pem", "cert": f"{tmp_path}/me.pem", "key": f"{tmp_path}/me.key"}
    try:
        etcd.start()
        made = open_registry({"url": etcd.url, **mine})
        async with watching(made.resolver("orders", {})) as (seen,):
            await until(lambda: seen.addresses, [])
            await made._client.put(b"/meshlib/services/orders/a", b'{"address": "%s"}' % A.encode())
            await until(lambda: seen.addresses, [A])
        for wrong in (
            {**mine, "verify": f"{tmp_path}/other.pem"},
            {**mine, "cert": f"{tmp_path}/stranger.pem", "key": f"{tmp_path}/stranger.key"},
            {"verify": f"{tmp_path}/ca.pem"},
            {},
        ):
            refused = open_registry({"url": etcd.url, **wrong})
            with pytest.raises(EtcdError, match="can't be reached"):
                await refused.resolver("orders", {}).resolve()
            await refused.close()
        # New connections are made with what stands in the files now; a restart ends those that are open.
        for part in ("pem", "key"):
            shutil.copy(tmp_path / f"me.{part}", tmp_path / f"other-of-me.{part}")
            shutil.copy(tmp_path / f"stranger.{part}", tmp_path / f"me.{part}")
        etcd.kill()
        etcd.start()
        own = {"cert": f"{tmp_path}/other-of-me.pem", "key": f"{tmp_path}/other-of-me.key"}
        witness = open_registry({"url": etcd.url, **mine, **own})
        async with watching(witness.resolver("orders", {})) as (seen,):
            await until(lambda: seen.addresses, [A])
        await witness.close()
        with pytest.raises(EtcdError, match="can't be reached"):
            await made.resolver("orders", {}).resolve()
        certify(tmp_path, "me", ca)
        assert len((await made.resolver("orders", {}).resolve()).endpoints) == 1
        await made.close()
    finally:
        etcd.kill()


# ---------------------------------------------------------------- a configuration


def source(etcd: Etcd, more: str = "") -> EtcdSource:
    return open_config(f"etcd://127.0.0.1:{etcd.port}{KEY}{more}")


@contextlib.asynccontextmanager
async def waiting(made: EtcdSource) -> Any:
    task = asyncio.create_task(made.changed())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await task


async def test_configuration_that_could_not_be_read_is_due_when_etcd_is_there(etcd: Etcd) -> None:
    """Whoever began with what was kept on disk doesn't know what became of it: no event will tell, since it has happened already."""
    etcd.put(KEY, "newer than what was kept")
    made = source(etcd)
    await asyncio.wait_for(made.changed(), 10)
    assert made.read() == b"newer than what was kept"
    async with waiting(made) as changed:
        await asyncio.sleep(0.3)
        assert not changed.done()


async def test_configuration_is_read_and_its_changes_are_told(etcd: Etcd) -> None:
    """Those that came between the reading and the waiting, too; others' keys are not."""
    etcd.put(KEY, "one")
    made = source(etcd)
    assert made.read() == b"one"
    async with waiting(made) as changed:
        etcd.put(KEY + ".old", "x")
        await asyncio.sleep(0.3)
        assert not changed.done()
        etcd.put(KEY, "two")
        await asyncio.wait_for(changed, 10)
    assert made.read() == b"two"
    etcd.put(KEY, "three")
    await asyncio.wait_for(made.changed(), 10)
    etcd.compact()
    await asyncio.wait_for(made.changed(), 10)
    assert made.read() == b"three"


async def test_deleted_configuration_is_told_once(etcd: Etcd) -> None:
    """As an error with what to do, until it is there again."""
    etcd.put(KEY, "one")
    made = source(etcd)
    made.read()
    etcd.delete(KEY)
    await asyncio.wait_for(made.changed(), 10)
    with pytest.raises(meshlib.ConfigError, match="nothing at the key /meshlib/config/mesh.yaml"):
        made.read()
    async with waiting(made) as changed:
        await asyncio.sleep(0.3)
        assert not changed.done()
        etcd.put(KEY, "two")
        await asyncio.wait_for(changed, 10)
    assert made.read() == b"two"


async def test_etcd_that_is_away_or_lost_its_data_is_told(etcd: Etcd) -> None:
    """Silence for ever would be no answer."""
    for _ in range(20):
        etcd.put(KEY, "one")
    made = source(etcd, "?timeout=500ms")
    made.read()
    async with waiting(made) as changed:
        await asyncio.sleep(0.3)
        etcd.kill()
        with pytest.raises(EtcdError):
            await asyncio.wait_for(changed, 10)
    begun = time.monotonic()
    with pytest.raises(OSError, match="can't be reached"):
        made.read()
    assert time.monotonic() - begun < 5
    etcd.start()
    etcd.empty()
    etcd.put(KEY, "two")
    await asyncio.wait_for(made.changed(), 10)
    assert made.read() == b"two"


async def test_configuration_has_users_too(etcd: Etcd, password: Path) -> None:
    """What is needed stands after the question mark."""
    etcd.put(KEY, "one")
    lock(etcd)
    assert source(etcd, f"?user=mesh&password_file={password}").read() == b"one"
    with pytest.raises(OSError, match="user name is empty"):
        source(etcd).read()


def test_mesh_loads_its_configuration_from_etcd(etcd: Etcd, tmp_path: Path, monkeypatch: Any) -> None:
    """By the scheme of MESHLIB_CONFIG alone, and from what it kept while etcd is away."""
    monkeypatch.chdir(tmp_path)
    etcd.put(KEY, '{"mesh": "shop", "secure": {"mode": "observe"}, "services": {"orders": {}}}')
    monkeypatch.setenv("MESHLIB_CONFIG", f"etcd://127.0.0.1:{etcd.port}{KEY}")
    for _ in range(2):
        mesh = meshlib.Mesh.load()
        try:
            assert mesh.config.name == "shop"
        finally:
            mesh.close()
        etcd.kill()
