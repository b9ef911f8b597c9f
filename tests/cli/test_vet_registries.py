"""Does `meshlib vet` find what is wrong in what is for a registry's package, and say of a configuration what is true?"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from meshlib.cli import main
from meshlib.discover import Instance, Registration
from meshlib.errors import ConfigError
from tests.discover.memory import Memory, System

HEAD = """\
    mesh: shop
    secure: {mode: observe}
    """


class Shelf(Memory):
    """A registry that knows a few settings, and opens no connection."""

    def resolver(self, service: str, settings: Mapping[str, Any]) -> Any:
        only(f"services.{service}.discover", settings, "name")
        return super().resolver(service, settings)

    def register(self, instance: Instance, settings: Mapping[str, Any]) -> Registration:
        only(f"services.{instance.service}.register", settings, "name", "ttl")
        if settings.get("ttl") == "1s":
            raise ConfigError(f"services.{instance.service}.register.ttl must be 2 s at least.", hint="ttl: 10s")
        if settings.get("ttl") == "late":
            raise ConfigError("register: it is late.", hint="wait")
        if settings.get("ttl") == "odd":
            raise KeyError("secret")
        return super().register(instance, settings)


def only(where: str, settings: Mapping[str, Any], *known: str) -> None:
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown settings {', '.join(unknown)}.", unknown=unknown, known=known)


def open_shelf(settings: Mapping[str, Any]) -> Shelf:
    only("registries.shelf", settings, "url", "password", "verify")
    if "url" not in settings:
        raise ConfigError("registries.shelf: needs url.", hint="url: http://…")
    if settings.get("password") == "clear":
        raise ConfigError("registries.shelf.password must say where it is.")
    if "verify" in settings:
        try:
            Path(settings["verify"]).read_bytes()
        except OSError as error:
            raise ConfigError(f"registries.shelf.verify can't be read: {type(error).__name__}.") from None
    return Shelf(System(), settings)


class Point:
    value = "shelf"

    def load(self) -> Any:
        return open_shelf


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MESHLIB_CONFIG", "MESHLIB_SERVICE", "MESHLIB_DEV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "meshlib.config.plugin.entry_points",
        lambda *, group, name: [Point()] if (group, name) == ("meshlib.resolver", "shelf") else [],
    )
    return tmp_path


def vet(rest: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], str]:
    Path("mesh.yaml").write_text(textwrap.dedent(HEAD) + textwrap.dedent(rest))
    code = main(["vet"])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_mistakes_for_packages_are_told_with_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    """With file, line and key, and the word that was meant; those of a registry hide none of those that use it."""
    code, out, err = vet(
        """\
        registries:
          shelf:
            ulr: http://127.0.0.1:1
            pasword: {env: X}
          etdc: {}
        services:
          orders:
            listen: 127.0.0.1:8443
            deadlin: 2
            discover: {registry: shelf, nmae: x}
            register:
              registry: shelf
              tll: 5s
              addres: 10.0.0.1:80
        """,
        capsys,
    )
    assert code == 2
    assert [line.split(" (")[0] for line in out] == [
        "mesh.yaml:5: registries.shelf.ulr: unknown key",
        "mesh.yaml:6: registries.shelf.pasword: unknown key",
        "mesh.yaml:7: registries.etdc: no installed package provides 'etdc'",
        "mesh.yaml:11: services.orders.deadlin: unknown key",
        "mesh.yaml:12: services.orders.discover.nmae: unknown key",
        "mesh.yaml:15: services.orders.register.tll: unknown key",
        "mesh.yaml:16: services.orders.register.addres: unknown key",
    ]
    meant = ["url", "password", "etcd", "deadline", "name", "ttl", "address"]
    assert [f"did you mean {word!r}?" in line for word, line in zip(meant, out, strict=True)] == [True] * 7
    assert "pip install meshlib-etcd" in out[2]
    assert "7 problems" in err


@pytest.mark.parametrize(
    ("register", "told"),
    [
        ("{registry: main, ttl: 1s}", "mesh.yaml:5: services.orders.register.ttl: must be 2 s at least (ttl: 10s)"),
        ("{registry: main, weight: heavy}", "mesh.yaml:5: services.orders.register.weight: must be a number above 0"),
        ("{registry: main, labels: {version: 2}}", "mesh.yaml:5: services.orders.register.labels: must be a mapping of words"),
        ('{registry: main, address: "0.0.0.0:80"}', "mesh.yaml:5: services.orders.register.address: can't be 0.0.0.0:80, which"),
        ("{registry: main, ttl: late}", "mesh.yaml:5: services.orders.register: it is late (wait)"),
        ("{registry: main, ttl: odd}", "mesh.yaml:5: services.orders.register: its package can't use it: KeyError"),
    ],
)
def test_entry_that_could_never_be_made_is_a_mistake(register: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the package refuses, and what nobody could call: told before a process tries it for ever."""
    code, out, _ = vet(
        f"""\
        registries: {{main: {{plugin: shelf, url: x}}}}
        services: {{orders: {{listen: "0.0.0.0:0",
            register: {register}}}}}
        """,
        capsys,
    )
    assert (code, [line.startswith(told) for line in out]) == (2, [True]), out


def test_wrong_value_of_a_registry_is_told_at_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Under the name that the registry has in this file, whatever its package calls it."""
    code, out, _ = vet(
        """\
        registries:
          main:
            plugin: shelf
            url: x
            password: clear
        services: {orders: {discover: main}}
        """,
        capsys,
    )
    assert (code, out) == (2, ["mesh.yaml:7: registries.main.password: must say where it is"])


def test_file_that_is_only_missing_here_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """vet speaks of the configuration, and may run where nothing of it will ever run."""
    code, out, _ = vet(
        """\
        registries: {shelf: {url: x, verify: /nowhere/ca.pem}}
        services: {orders: {listen: "127.0.0.1:80", discover: shelf, register: {registry: shelf, labels: {a: b}, weight: 2}}}
        """,
        capsys,
    )
    assert code == 0, out
    assert "warning: mesh.yaml:3: registries.shelf.verify: can't be read: FileNotFoundError" in out


def test_where_a_service_is_found_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """In the table and in JSON."""
    pytest.importorskip("dns")
    _, out, _ = vet(
        """\
        registries: {shelf: {url: x}}
        services:
          orders: {discover: shelf}
          carts: {discover: {srv: _carts._tcp.internal}}
          stock: {discover: {dns: "stock:80"}}
        """,
        capsys,
    )
    assert [word for word in ("registry shelf", "srv _carts._tcp.internal", "dns stock:80") if word in "\n".join(out)] == [
        "registry shelf",
        "srv _carts._tcp.internal",
        "dns stock:80",
    ]
    assert main(["vet", "--json"]) == 0
    services = json.loads(capsys.readouterr().out)["services"]
    assert [each["endpoints"] for each in services] == ["registry shelf", "srv _carts._tcp.internal", "dns stock:80"]


@pytest.mark.parametrize("is_json", [False, True])
def test_url_that_leads_nowhere_is_told_for_people_and_programs(is_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """No package for its scheme, or one that refuses it: a mistake like any other, and never a valid configuration."""
    code = main(["vet", *(["--json"] if is_json else []), "ectd://user:geheim@127.0.0.1:1/x"])
    out, err = capsys.readouterr()
    assert (code, "geheim" in out + err) == (2, False)
    if is_json:
        answer = json.loads(out)
        (problem,) = answer["problems"]
        assert (answer["is_valid"], problem["file"], problem["key"]) == (False, "ectd://127.0.0.1:1/x", "(source)")
        assert "no installed package provides 'ectd'" in problem["message"]
    else:
        assert out.startswith("ectd://127.0.0.1:1/x:1: (source): no installed package provides 'ectd' (did you mean 'etcd'?")
        assert "1 problem." in err


def test_error_without_a_place_is_no_valid_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever raises it need not know of a file."""

    def refuse(*args: object, **options: object) -> None:
        raise ConfigError("it is not to be.", hint="Ask.")

    monkeypatch.setattr("meshlib.config.examine", refuse)
    assert main(["vet"]) == 2
    out, err = capsys.readouterr()
    assert "it is not to be." in out
    assert "1 problem." in err
    assert main(["vet", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["is_valid"], answer["problems"][0]["message"]) == (False, "it is not to be.")
