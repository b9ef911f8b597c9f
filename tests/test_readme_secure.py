"""Is what the README says of certificates, rules, tokens and alerts true today?

As in test_readme.py, whose tools these are: the blocks of the section "Who is who, and who may do what" are taken out and run, the
table of calls is called, and what is shown is compared with what comes out now. What is not checked: prose, and a build with AWS-LC.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

import meshlib
from meshlib import cli
from meshlib.observe.edges import KINDS, Alert
from tests.support import ROOT, free_port, identities, process, wait_until_listening
from tests.test_readme import MESHLIB, README, Shop, block, command, commands, measured, rungs, until

ISSUER = "https://id.shop.example/"
KEY = ec.generate_private_key(ec.SECP256R1())
CALL = re.compile(r"^\| (\w+): `([A-Z]+) (\S+)` \|(.*?)\|(.*?)\| (\d+) \|", re.MULTILINE)
# What the table's paths lead to; the README shows what speaks of the mesh.
REST = """
@api.get("/items/{item}")
@api.get("/admin/{page}")
def show():
    return {}
"""


def shown(text: str) -> list[str]:
    """Without what differs from run to run: serial numbers, too."""
    return measured(re.sub(r"\b[0-9a-f]{16}\b", "0", text))


def vetted(file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `meshlib vet` says of a file without mistakes."""
    capsys.readouterr()
    assert cli.main(["vet", str(file)]) == 0, capsys.readouterr().out
    told = capsys.readouterr()
    return told.out + told.err


# ---------------------------------------------------------------- certificates


def test_a_service_enrols_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the authority's machine, the file of the service's: it serves, its token is gone and good for nothing."""
    here, there = tmp_path / "ca.host", tmp_path / "orders.host"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    authority, port = f"127.0.0.1:{free_port()}", free_port()
    for start in ("meshlib ca init", "meshlib ca issue ./ca storefront"):
        assert cli.main(command(start)[1:]) == 0
    serve = [each.replace("0.0.0.0:8444", authority) for each in command("meshlib ca serve")]
    with process(*serve, cwd=here) as serving:
        wait_until_listening(int(authority.rpartition(":")[2]), serving)
        assert cli.main([each.replace("ca.host:8444", authority) for each in command("meshlib ca token")[1:]]) == 0
        token = (here / "orders.token").read_bytes()
        (there / "orders.token").write_bytes(token)
        (there / "orders.token").chmod(0o600)
        text = block("enrolled.yaml").replace("ca.host:8444", authority)
        text = text.replace("0.0.0.0:8101", f"127.0.0.1:{port}").replace("dns: orders.host:8101", f'static: ["127.0.0.1:{port}"]')
        (there / "mesh.yaml").write_text(text)
        (there / "orders.py").write_text(block("orders.py"))
        (there / "caller.yaml").write_text(re.sub(r"identity: .*", f"identity: {{folder: {here}/identities}}", text))
        with process(MESHLIB, "serve", "orders:app", "--service", "orders", cwd=there) as child:
            wait_until_listening(port, child)
            mesh = meshlib.Mesh.load(there / "caller.yaml", service="storefront")
            with mesh.sync_client() as http:
                assert http.get("http://orders/items/7").json()["for"] == "storefront"
            mesh.close()
        assert not (there / "orders.token").exists()
        assert 86_000 < _certificate_of(there / "identities/orders").not_valid_after_utc.timestamp() - time.time() <= 86_400
        (there / "orders.token").write_bytes(token)
        (there / "orders.token").chmod(0o600)
        assert cli.main(["ca", "enroll", str(there / "orders.token"), "--out", str(there / "nginx")]) == 1


def _certificate_of(folder: Path) -> Any:
    from cryptography import x509

    return x509.load_pem_x509_certificates((folder / "svid.pem").read_bytes())[0]


@pytest.mark.parametrize("line", re.findall(r"^\| `((?:identity|federation): .*?)` \|", README, re.MULTILINE))
def test_every_source_of_certificates_passes_vet(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of the table is one that `secure` takes."""
    more = "" if line.startswith("identity") else ", identity: {folder: ./identities}"
    (tmp_path / "mesh.yaml").write_text(f"mesh: shop\nsecure: {{mode: enforce{more}, {line}}}\nservices:\n  storefront: {{}}\n")
    told = vetted(tmp_path / "mesh.yaml", capsys)
    assert ("partner.example" in told) == line.startswith("federation")


def test_a_source_of_ones_own_conforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source and its test, to which the README leads."""
    assert "(examples/source)" in README
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("vault", "test_vault"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"examples/source/{name}.py").read_text())
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module("test_vault").test_the_vault_conforms()
    for name in ("vault", "test_vault"):
        monkeypatch.delitem(sys.modules, name)


# ---------------------------------------------------------------- rules and tokens


def token(claims: str) -> dict[str, str]:
    """The header for what the table says of a token: `sub: alice`."""
    if not claims:
        return {}
    name, value = claims.split(": ")
    now = int(time.time())
    said: dict[str, Any] = {"iss": ISSUER, "sub": "alice", "aud": "orders", "iat": now, "exp": now + 300}
    said[name] = [value] if name == "groups" else value
    return {"authorization": "Bearer " + jwt.encode(said, KEY, "ES256", headers={"kid": "k1"})}


@contextlib.contextmanager
def callers(file: Path) -> Iterator[dict[str, httpx.Client]]:
    """A client of each service that calls."""
    with contextlib.ExitStack() as stack:
        made: dict[str, httpx.Client] = {}
        for name in ("storefront", "gateway"):
            mesh = meshlib.Mesh.load(file, service=name)
            stack.callback(mesh.close)
            made[name] = stack.enter_context(mesh.sync_client())
        yield made


def test_each_call_of_the_table_ends_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rules of the README under its authorizer: every row is called, and the dry run is counted, not refused."""
    port, metrics = free_port(), free_port()
    identities(tmp_path, "storefront", "gateway", "orders")
    public = {**json.loads(ECAlgorithm.to_jwk(KEY.public_key())), "kid": "k1", "alg": "ES256", "use": "sig"}
    (tmp_path / "people.json").write_text(json.dumps({"keys": [public]}))
    (tmp_path / "mesh.yaml").write_text(block("rules.yaml").replace("8101", str(port)))
    imports = "from fastapi import FastAPI\nimport meshlib\n"
    (tmp_path / "rules.py").write_text(imports + block("rules.py") + REST)
    monkeypatch.setenv("MESHLIB_METRICS", f"127.0.0.1:{metrics}")
    rows = CALL.findall(README)
    assert len(rows) == 12
    with process(MESHLIB, "serve", "rules:app", "--service", "orders", cwd=tmp_path) as child:
        monkeypatch.delenv("MESHLIB_METRICS")
        wait_until_listening(port, child)
        wait_until_listening(metrics, child)
        ended = []
        with callers(tmp_path / "mesh.yaml") as http:
            for caller, method, path, claims, forwarded, _ in rows:
                place = forwarded.strip(" `")
                headers = token(claims.strip(" `")) | ({"x-forwarded-for": place} if place else {})
                ended.append(str(http[caller].request(method, f"http://orders{path}", headers=headers).status_code))
            alice = http["storefront"].post("http://orders/orders", headers=token("sub: alice"))
        assert ended == [row[-1] for row in rows]
        assert alice.json() == {"by": "storefront", "for": "alice"}

        def would_deny() -> int:
            capsys.readouterr()
            cli.main(["status", "--address", f"127.0.0.1:{metrics}", "--json"])
            edges = json.loads(capsys.readouterr().out)["edges"]
            return sum(edge["would_deny"] for edge in edges if edge["caller"] == "gateway")

        # The dry run would have refused it twice: the item, and the page.
        until(would_deny, 2)


def test_the_clauses_of_the_table_are_those_of_rules() -> None:
    """Each clause that is named exists, and each that exists is named, but for its negation and for what is elsewhere in the section."""
    from meshlib.config.secure_document import Rule

    clauses = {field.alias or name for name, field in Rule.model_fields.items()}
    table = re.search(r"^\| clause \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert table is not None
    named = {word for cell in re.findall(r"^\| (`.*?) \|", table[0], re.MULTILINE) for word in re.findall(r"`(\w+)", cell)}
    assert named <= clauses
    assert {name for name in clauses - named if not name.startswith("not_")} == {"name", "trust_domains", "case"}


# ---------------------------------------------------------------- the way out


def test_egress_lets_out_what_is_listed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The credential is added to calls to its host; other hosts are refused."""
    file = tmp_path / "mesh.yaml"
    file.write_text(block("egress.yaml"))
    assert "api.stripe.com" in vetted(file, capsys)
    monkeypatch.setenv("STRIPE_KEY", "sk-1")
    mesh = meshlib.Mesh.load(file, service="storefront")
    try:
        assert mesh.leaving("https", "api.stripe.com", []) == [("authorization", "Bearer sk-1")]
        assert mesh.leaving("http", "api.stripe.com", []) == []
        assert mesh.leaving("https", "www.github.com", []) == []
        with pytest.raises(meshlib.Denied):
            mesh.leave("www.example.com")
    finally:
        mesh.close()


# ---------------------------------------------------------------- what you see


def test_status_and_suggest_show_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rung 3, recorded: three calls over mutual TLS, of which one is in no rule, and one in plain text."""
    monkeypatch.chdir(tmp_path)
    rung = rungs()[2].replace("{mode", "{record: true, mode")
    shop = Shop(tmp_path, rung)
    for start in ("meshlib ca init", "meshlib ca issue ./ca storefront"):
        assert cli.main(command(start)[1:]) == 0

    def told(*line: str) -> str:
        capsys.readouterr()
        cli.main([*line])
        return capsys.readouterr().out

    with shop.serve() as child:
        wait_until_listening(shop.port, child)
        mesh = meshlib.Mesh.load(tmp_path / "mesh.yaml", service="storefront")
        with mesh.sync_client() as http:
            for path in ("/items/7", "/items/8", "/prices"):
                http.get(f"http://orders{path}")
        mesh.close()
        # Somebody looks each second: what comes in plain is told from what came before.
        until(lambda: "storefront" in told("status"), expected=True)
        assert shop.ask_plainly() == 200
        until(lambda: shown(told("status")), shown(block("status")))
        until(lambda: shown(told("suggest")), shown(block("suggest")), seconds=12.0)


def test_an_alert_is_told_to_whoever_asked() -> None:
    """The callback of the README, and the kinds that it names."""
    sent: list[str] = []
    asked: list[Any] = []
    exec(block("alerts"), {"on_call": SimpleNamespace(send=sent.append), "mesh": SimpleNamespace(on_alert=asked.append)})
    asked[0](Alert("mtls_lost", "storefront → orders", "it comes in plain"))
    assert sent == ["mtls_lost storefront → orders: it comes in plain"]
    assert callable(meshlib.Mesh.on_alert)
    assert [kind for kind in KINDS if f"(`{kind}`)" not in README] == []


def test_the_library_can_be_built_with_the_features_that_are_named() -> None:
    """Cargo's own names; the build itself takes minutes."""
    known = tomllib.loads((ROOT / "meshlib/_native/binding/Cargo.toml").read_text())["features"]
    lines = [shlex.split(line) for line in commands() if line.startswith("maturin ")]
    named = {each for line in lines for each in line[line.index("--features") + 1].split(",") if "/" not in each}
    assert named == {"aws-lc", "fips"}
    assert named <= set(known)
