"""Is the agent asked as the configuration says, and with the token that it names?"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from meshlib_consul import ConsulError, open_registry

from integrations.consul.tests.agents import StandInAgent
from integrations.consul.tests.standin import StandIn
from meshlib.errors import ConfigError


async def test_the_token_is_read_anew_for_each_question(standin: StandInAgent, tmp_path: Any) -> None:
    """A wrong one shows nothing, and Consul says so: that is no empty service. One that was exchanged on disk counts at once."""
    standin.put("orders", 1)
    standin.standin.token = "right"
    file = tmp_path / "token"
    file.write_text("wrong\n")
    registry = open_registry({"url": standin.url, "token": {"file": str(file)}})
    resolver = registry.resolver("orders", {})
    with pytest.raises(ConsulError, match="may not see"):
        await resolver.resolve()
    file.write_text("right\n")
    assert len((await resolver.resolve()).endpoints) == 1
    file.write_text("ri\nght")
    with pytest.raises(ConsulError, match="holds no token") as caught:
        await resolver.resolve()
    assert "ght" not in str(caught.value).replace("right", "")
    await registry.close()


async def test_a_token_of_the_environment_is_the_one_that_is_named(
    standin: StandInAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that py-consul would take by itself."""
    standin.put("orders", 1)
    standin.standin.token = "right"
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "other")
    monkeypatch.setenv("OUR_TOKEN", "right")
    registry = open_registry({"url": standin.url, "token": {"env": "OUR_TOKEN"}})
    assert len((await registry.resolver("orders", {}).resolve()).endpoints) == 1
    await registry.close()
    nobody = open_registry({"url": standin.url})
    with pytest.raises(ConsulError):
        await nobody.resolver("orders", {}).resolve()
    await nobody.close()
    sent = [headers.get("X-Consul-Token") for _, path, _, headers in standin.standin.requests if path.startswith("/v1/health")]
    assert sent == ["right", None]


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "ftp://x"}, {"url": "http://u:hunter2@x"}, {"url": "http://x/path"}, {"url": "http://x:port"}, {"url": 7},
        {"token": "hunter2"}, {"token": {"env": "A", "file": "B"}}, {"token": {"value": "hunter2"}}, {"timeout": "5"}, {"timeout": 0},
        {"wait": "11m"}, {"stale": "yes"}, {"verify": "/no/such/file", "url": "https://x"}, {"verify": "/x"}, {"unknown": 1},
        {"url": "unix:relative"}, {"timeout": True}, {"datacenter": ""},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_without_a_secret(settings: dict[str, Any]) -> None:
    """What it doesn't know, it doesn't ignore; and it quotes nothing that could be a token."""
    with pytest.raises(ConfigError) as caught:
        open_registry(settings)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"tag": "x"}, {"tags": [1]}, {"passing_only": "no"}, {"filter": ""}, {"near": 5}])
def test_wrong_keys_of_a_service_are_refused(settings: dict[str, Any]) -> None:
    """They name the place where they stand."""
    with pytest.raises(ConfigError, match=r"services\.orders\.discover"):
        open_registry({}).resolver("orders", settings)


def test_unknown_settings_are_named_for_programs() -> None:
    """So that each is told at its line, with the word that was meant."""
    with pytest.raises(ConfigError) as caught:
        open_registry({"ulr": "http://127.0.0.1:8500"})
    assert (caught.value.unknown, "url" in caught.value.known) == (("ulr",), True)
    with pytest.raises(ConfigError) as caught:
        open_registry({}).resolver("orders", {"nmae": "x"})
    assert (caught.value.unknown, "name" in caught.value.known) == (("nmae",), True)


async def test_every_setting_reaches_consul(standin: StandInAgent) -> None:
    """As the parameter that it has there, and names with odd letters as they are."""
    registry = open_registry({"url": standin.url, "datacenter": "dc1", "stale": True})
    settings = {"name": "orders v2?x=%41", "tags": ["a", "b"], "near": "_agent", "filter": 'Service.Meta.a == "b"'}
    await registry.resolver("orders", settings).resolve()
    await registry.resolver("orders", {"datacenter": "dc1", "passing_only": False}).resolve()
    with pytest.raises(ConsulError, match="No path to datacenter"):
        await registry.resolver("orders", {"datacenter": "dc9"}).resolve()
    await registry.close()
    (first, second, _) = standin.standin.requests
    assert first[1] == "/v1/health/service/orders v2?x=%41"
    assert first[2] == {
        "tag": "a",
        "filter": 'Service.Meta.a == "b"',
        "dc": "dc1",
        "near": "_agent",
        "passing": "1",
        "stale": "1",
    }
    assert second[2] == {"dc": "dc1", "stale": "1"}
    enterprise = open_registry({"url": standin.url, "namespace": "team", "partition": "p"})
    with pytest.raises(ConsulError, match="Enterprise"):
        await enterprise.resolver("orders", {}).resolve()
    await enterprise.close()
    assert standin.standin.requests[-1][2] == {"passing": "1", "ns": "team", "partition": "p"}


async def test_an_agent_is_asked_by_tls_when_its_certificate_is_good(tmp_path: Path) -> None:
    """By the CA that is named; anybody else's is refused."""
    files = certificate_in(tmp_path)
    standin = StandIn()
    standin.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    standin.tls.load_cert_chain(*files)
    standin.start()
    try:
        good, bad = (open_registry({"url": standin.url, **each}) for each in ({"verify": files[0]}, {}))
        assert (await good.resolver("orders", {}).resolve()).endpoints == ()
        with pytest.raises(ConsulError, match="certificate verify failed"):
            await bad.resolver("orders", {}).resolve()
        await good.close()
        await bad.close()
    finally:
        standin.kill()


async def test_an_agent_may_be_asked_by_its_socket(tmp_path: Path) -> None:
    """Which nobody else on the machine may open, if its folder says so."""
    standin = StandIn()
    standin.socket = str(tmp_path / "consul.sock")
    standin.start()
    try:
        registry = open_registry({"url": f"unix://{standin.socket}"})
        assert (await registry.resolver("orders", {}).resolve()).endpoints == ()
        await registry.close()
    finally:
        standin.kill()


def certificate_in(folder: Path) -> tuple[str, str]:
    """One for 127.0.0.1 that has signed itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "agent")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "agent.pem", folder / "agent.key"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(paths[0]), str(paths[1])


async def test_a_token_that_is_not_there_is_an_error_and_nobody_asks_without_it(
    standin: StandInAgent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A variable that is empty or not set, a file that is empty or gone."""
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    for token in ({"env": "EMPTY"}, {"env": "UNSET"}, {"file": f"{tmp_path}/empty"}, {"file": f"{tmp_path}/gone"}):
        registry = open_registry({"url": standin.url, "token": token})
        with pytest.raises(ConsulError, match="token"):
            await registry.resolver("orders", {}).resolve()
        await registry.close()
    assert standin.standin.requests == []
