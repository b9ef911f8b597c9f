"""What do registries and the node agent become after a file is read?"""

from __future__ import annotations

from pathlib import Path

import pytest

from meshlib.config import load
from meshlib.config.agent_policy import AgentPolicy, EntryPolicy
from meshlib.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"


def test_agent_is_read_with_paths_beside_the_file() -> None:
    """Sockets as they stand, files relative to mesh.yaml."""
    expected = AgentPolicy(
        socket="/run/meshlib/agent.sock",
        data="/run/meshlib/data.sock",
        admin="/run/meshlib/admin.sock",
        state=Path("/var/lib/meshlib"),
        workers=2,
        ca=None,
        enrol="https://ca.shop.test:8444",
        admins=(1000,),
        entries=(
            EntryPolicy(
                "orders",
                1001,
                1001,
                "/usr/bin/python3.11",
                ("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",),
                "orders.service",
                "/system.slice/orders.service",
                GOLDEN / "orders.token",
            ),
        ),
    )
    assert load(GOLDEN / "agent.yaml", service="orders").agent == expected


def test_identity_of_the_agent_is_at_its_socket_or_another() -> None:
    """`true` is the socket of this file."""
    ours, other = (load(GOLDEN / name, service="orders").identity_source for name in ("agent.yaml", "agent-ca.yaml"))
    assert ours is not None
    assert other is not None
    assert [(one.kind, one.socket) for one in (ours, other)] == [
        ("agent", "unix:///run/meshlib/agent.sock"),
        ("agent", "unix:///run/other/agent.sock"),
    ]


def test_delegation_is_the_systems_unless_the_service_says_otherwise() -> None:
    """`delegate: agent` for all, `off` for one."""
    services = load(GOLDEN / "agent.yaml", service="orders").services
    assert {name: service.is_delegated for name, service in services.items()} == {
        "storefront": False,
        "orders": True,
        "stock": True,
    }


def test_registries_get_what_is_theirs_and_nobody_sees_it() -> None:
    """The plugin is the entry's name unless it says otherwise; settings stand in no repr, since they may be secret."""
    config = load(GOLDEN / "agent.yaml", service="orders")
    consul, main = config.registries["consul"], config.registries["main"]
    assert (consul.plugin, consul.cache, dict(consul.settings)) == (
        "consul",
        GOLDEN / "endpoints",
        {"url": "http://127.0.0.1:8500", "token": {"env": "CONSUL_TOKEN"}},
    )
    assert (main.plugin, main.cache, dict(main.settings)) == ("etcd", None, {"url": "http://127.0.0.1:2379"})
    assert "CONSUL_TOKEN" not in repr(config)


def test_discover_and_register_pass_on_the_keys_of_the_registry() -> None:
    """And a word is short for a registry."""
    services = load(GOLDEN / "agent.yaml", service="orders").services
    orders, storefront = services["orders"], services["storefront"]
    assert orders.discover is not None
    assert (orders.discover.registry, dict(orders.discover.settings)) == ("consul", {"name": "orders-v2", "tags": ("blue",)})
    assert orders.register is not None
    assert (orders.register.registry, orders.register.address, dict(orders.register.settings)) == (
        "main",
        "10.0.0.7:8443",
        {"lease": 10},
    )
    assert storefront.register is not None
    assert (storefront.register.registry, storefront.register.address) == ("consul", "")
    assert orders.inbound.agent == "/run/orders/app.sock"


LONG = "/opt/shop/services/orders/releases/2026-11-22T08-00-00Z-3f9c2d1ab7/virtualenvs/orders-service-py3.11-production/bin/python3.11"


def entry_of(folder: Path, path: str) -> EntryPolicy:
    file = folder / "mesh.yaml"
    file.write_text(
        "mesh: shop\nsecure: {mode: observe}\nservices: {orders: {}}\n"
        f"agent: {{ca: ca, entries: [{{service: orders, uid: 1001, path: {path}}}]}}\n"
    )
    node = load(file).agent
    assert node is not None
    return node.entries[0]


def test_the_path_of_an_executable_is_as_long_as_that_of_any_file(tmp_path: Path) -> None:
    """It is no socket, whose paths are short; up to what the kernel takes."""
    assert len(LONG) > 107
    longest = "/" + "/".join(["x" * 254] * 17)[:4094]
    for path in (LONG, longest):
        assert entry_of(tmp_path, path).path == path


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("python3.11", "is not a plain absolute path (the executable itself and no link to it, such as /usr/bin/python3.11)"),
        ("/usr/../bin/true", "is not a plain absolute path"),
        ("/" + "x" * 4095, "is longer than the 4095 bytes that a path may have"),
    ],
)
def test_what_names_no_executable_is_refused_without_a_word_of_sockets(tmp_path: Path, path: str, told: str) -> None:
    """In words that are about what was written."""
    with pytest.raises(ConfigError) as caught:
        entry_of(tmp_path, path)
    assert told in str(caught.value)
    assert "sock" not in str(caught.value)
