"""Does development stay on this machine, and does its throw-away trust stay in development?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.config import DEV_TRUST_DOMAIN, load
from meshlib.errors import ConfigError

TEXT = """\
    mesh: shop
    secure: {mode: enforce, trust_domain: shop.internal}
    services:
      web:
        listen: 127.0.0.1:8000
        identity: spiffe://shop.internal/special/web
      orders:
        discover: {static: ["localhost:8101", {address: "[::1]:8102", identity: spiffe://shop.internal/canary}]}
        secure:
          allow:
            - from: [web, spiffe://shop.internal/special/web, "spiffe://shop.internal/ns/*", spiffe://other.test/x]
    """


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "throwaway"
    monkeypatch.setenv("MESHLIB_DEV", str(folder))
    return folder


def test_development_brings_folder_and_trust_domain(write: Callable[..., Path], dev: Path) -> None:
    """No identity in the file is needed, and every service has its default path in the domain of development."""
    config = load(write(TEXT), service="web")
    assert (True, dev, "dev.meshlib.invalid") == (config.is_dev, config.identity_folder, config.trust_domain)
    assert config.secure.trust_domain == DEV_TRUST_DOMAIN
    assert config.identity_of("web") == "spiffe://dev.meshlib.invalid/ns/default/sa/web"


def test_the_rules_of_the_file_are_carried_over(write: Callable[..., Path], dev: Path) -> None:
    """The file's own domain becomes that of development; a foreign one stays, and matches nobody."""
    config = load(write(TEXT), service="orders")
    assert json.loads(config.server_plan())["rules"][0]["from"] == [
        {"kind": "exact", "value": "spiffe://dev.meshlib.invalid/ns/default/sa/web"},
        {"kind": "prefix", "value": "spiffe://dev.meshlib.invalid/ns/"},
        {"kind": "exact", "value": "spiffe://other.test/x"},
    ]
    discover = config.own.discover
    assert discover is not None
    assert discover.static is not None
    assert [endpoint.identity for endpoint in discover.static] == [None, None]


def test_without_development_the_same_file_needs_an_identity(write: Callable[..., Path]) -> None:
    """The throw-away CA is no fallback."""
    with pytest.raises(ConfigError, match=r"secure\.identity: is missing"):
        load(write(TEXT), service="web")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("listen: 127.0.0.1:8000", "listen: 0.0.0.0:8000", "services.web.listen"),
        ("listen: 127.0.0.1:8000", 'listen: "[::]:8000"', "services.web.listen"),
        ('"localhost:8101"', '"10.0.0.1:8101"', "services.orders.discover.static[0]"),
        ('"[::1]:8102"', '"orders.internal:8102"', "services.orders.discover.static[1]"),
        ("mesh: shop", 'mesh: shop\n    observe: {metrics: "0.0.0.0:9464"}', "observe.metrics"),
        ("listen: 127.0.0.1:8000", "discover: {dns: 'web.internal:80'}", "services.web.discover.dns"),
        ("listen: 127.0.0.1:8000", 'observe: {metrics: "10.0.0.1:1"}', "services.web.observe.metrics"),
        ("listen: 127.0.0.1:8000", "listen: localhost.example.com:8000", "services.web.listen"),
    ],
)
def test_in_development_every_address_is_loopback(old: str, new: str, key: str, write: Callable[..., Path], dev: Path) -> None:
    """What its CA vouches for must not leave the machine."""
    with pytest.raises(ConfigError) as caught:
        load(write(TEXT.replace(old, new)), service="web")
    assert [key] == [problem.key for problem in caught.value.problems]
    assert "not a loopback address" in caught.value.problems[0].message


def test_loopback_is_all_of_127_and_the_names_for_it(write: Callable[..., Path], dev: Path) -> None:
    """127.0.0.0/8, ::1 and localhost."""
    assert load(write(TEXT.replace("127.0.0.1:8000", "127.8.9.1:8000")), service="web").own.listen == "127.8.9.1:8000"


def test_the_domain_of_development_is_refused_in_development_too(write: Callable[..., Path], dev: Path) -> None:
    """No file names it: only `meshlib dev` sets it."""
    with pytest.raises(ConfigError, match="belongs to `meshlib dev`"):
        load(write(TEXT.replace("trust_domain: shop.internal", "trust_domain: dev.meshlib.invalid")), service="web")


def test_an_empty_variable_is_not_development(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """MESHLIB_DEV= switches it off."""
    monkeypatch.setenv("MESHLIB_DEV", "")
    config = load(write("mesh: m\nsecure: {mode: observe}\nservices: {a: {listen: '0.0.0.0:80'}}\n"))
    assert (config.is_dev, config.trust_domain) == (False, "m.internal")
