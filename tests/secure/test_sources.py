"""Does the source that the configuration names come out, and no other?"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib.config.secure_policy import IdentityChoice
from meshlib.errors import ConfigError, IdentityError
from meshlib.secure import CertificateAuthority, FolderSource, Identity, MountedSource, identity_source_of
from meshlib.secure.authority import Service
from meshlib.secure.enrol import EnrolledSource
from meshlib.secure.sources import open_plugin
from meshlib.testing import check_identity_source
from meshlib.testing import identity as conformance
from tests.secure import ca_world

ID = "spiffe://shop.internal/ns/default/sa/orders"
OWN = SimpleNamespace(name="orders", identity=ID)


def config(choice: IdentityChoice | None) -> Any:
    return SimpleNamespace(identity_source=choice, own=OWN, trust_domain="shop.internal")


def test_each_kind_makes_its_source() -> None:
    """With the paths that are configured, for the service that we are."""
    folder = identity_source_of(config(IdentityChoice("folder", folder=Path("/ids"))))
    assert isinstance(folder, FolderSource)
    assert (folder.path, folder.spiffe_id) == (Path("/ids/orders"), ID)
    paths = {name: Path(f"/tls/{name}") for name in ("certificate", "key", "bundle", "crl")}
    mounted: Any = identity_source_of(config(IdentityChoice("files", **paths)))
    assert isinstance(mounted, MountedSource)
    assert tuple(mounted._names) == ("/tls/certificate", "/tls/key", "/tls/bundle", "/tls/crl")


def test_enrolled_source_is_made_of_its_settings(tmp_path: Path) -> None:
    """Where its CA is, where its key and certificate are kept, and where its token lies."""
    settings = IdentityChoice("ca", ca="https://ca.host:8444", token=tmp_path / "token", state=tmp_path / "state")
    source: Any = identity_source_of(config(settings))
    assert isinstance(source, EnrolledSource)
    assert (source.place.address, source.path, source.spiffe_id) == ("ca.host:8444", tmp_path / "state" / "orders", ID)


def test_without_settings_there_is_no_source() -> None:
    """Mode observe needs none."""
    assert identity_source_of(config(None)) is None
    with pytest.raises(ConfigError, match="'vault' is no source"):
        identity_source_of(config(IdentityChoice("vault")))


def test_enrolled_source_conforms(tmp_path: Path) -> None:
    """As far as a source can be asked whose certificates come from its own CA: it publishes nothing that a test gives it."""

    class World:
        def __init__(self, spiffe_id: str) -> None:
            self.box = tmp_path / str(len(list(tmp_path.iterdir())))
            self.authority = CertificateAuthority.create(self.box / "ca", conformance.TRUST_DOMAIN)
            self.stack = ExitStack()
            self.server = self.stack.enter_context(ca_world.serving(Service(self.authority)))
            self.token = ca_world.token_file(self.box / "token", ca_world.token_of(self.authority, "checked"))

        def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
            raise NotImplementedError

        def source(self) -> EnrolledSource:
            url, where, domain = ca_world.url_of(self.server), self.box / "state", conformance.TRUST_DOMAIN
            return EnrolledSource(url, where, "checked", domain, conformance.SPIFFE_ID, token=self.token)

        def close(self) -> None:
            self.stack.close()

    assert check_identity_source(World) == [
        "a_good_identity_is_answered_whole",
        "an_unchanged_identity_is_the_same_object",
        "an_answer_is_quick",
        "a_source_that_renews_says_when",
        "a_key_is_never_shown",
        "an_identity_is_never_pickled",
    ]


# ---------------------------------------------------------------------------------------------------- plugins


class Mine:
    """A source of somebody's own."""

    def __init__(self, settings: dict[str, Any], *, spiffe_id: str, trust_domain: str) -> None:
        self.made = (settings, spiffe_id, trust_domain)

    def load(self) -> Identity:
        raise IdentityError("nothing here.", hint="Wait.")


def refuse(settings: Any, **_: Any) -> Any:
    raise ConfigError("secure.identity.colour: unknown.")


def burst(settings: Any, **_: Any) -> Any:
    raise ValueError(f"what was given is {settings}")


def nothing(settings: Any, **_: Any) -> Any:
    return object()


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What installed packages offer: names in this file."""
    names: list[str] = []

    def points(*, group: str, name: str) -> list[EntryPoint]:
        assert group == "meshlib.identity"
        return [EntryPoint(name, f"{__name__}:{each}", group) for each in names]

    monkeypatch.setattr("meshlib.config.plugin.entry_points", points)
    return names


def opened(settings: dict[str, Any] | None = None) -> Any:
    return open_plugin("mine", settings or {}, spiffe_id=ID, trust_domain="shop.internal")


def test_plugin_gets_its_settings_and_who_we_are(offered: list[str]) -> None:
    """A copy: what it does with them is its own business."""
    offered.append("Mine")
    settings = {"socket": "unix:///x"}
    source: Any = identity_source_of(config(IdentityChoice("plugin", plugin="mine", settings=settings)))
    assert source.made == (settings, ID, "shop.internal")
    assert source.made[0] is not settings


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "no installed package provides 'mine'"),
        (["Mine", "nothing"], "offered by 2 packages"),
        (["refuse"], "colour: unknown"),
        (["burst"], "can't be used: ValueError"),
        (["nothing"], "makes no source of identities"),
        (["absent"], "can't be used: AttributeError"),
    ],
)
def test_plugin_that_cannot_be_used_is_a_mistake(offered: list[str], names: list[str], reason: str) -> None:
    """Told by name, without what it was given: there may be a secret in it."""
    offered += names
    with pytest.raises(ConfigError, match=reason) as caught:
        opened({"token": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_plugin_is_loaded_only_if_the_configuration_names_it(tmp_path: Path) -> None:
    """Who installs a package doesn't run it yet."""
    (tmp_path / "loud.py").write_text("print('loaded')\ndef make(settings, **_): pass\n")
    info = tmp_path / "loud-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[meshlib.identity]\nloud = loud:make\n")
    code = """
        from types import SimpleNamespace
        from meshlib.config.secure_policy import IdentityChoice
        from meshlib.secure import identity_source_of
        own = SimpleNamespace(name="a", identity="spiffe://td/a")
        for kind in ("folder", "plugin"):
            settings = IdentityChoice(kind, folder=".", plugin="loud")
            print(kind)
            try:
                identity_source_of(SimpleNamespace(identity_source=settings, own=own, trust_domain="td"))
            except Exception as error:
                print(type(error).__name__)
    """
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    lines = "\n".join(line[8:] for line in code.splitlines())
    out = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert (out.stdout.split(), out.returncode) == (["folder", "plugin", "loaded", "ConfigError"], 0), out.stderr
