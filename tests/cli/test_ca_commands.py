"""Does `meshlib ca` lead from nothing to services with identities, on one machine and on several, and tell what it did?"""

from __future__ import annotations

import argparse
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from meshlib.cli import ca as command
from meshlib.cli import main
from meshlib.errors import Refused
from meshlib.secure import CertificateAuthority, certificates, jwt_svid
from meshlib.secure.authority import Service
from meshlib.secure.jwt_svid import TokenKeys
from meshlib.secure.tokens import PREFIX, Token
from tests.secure.ca_world import ORDERS, serving, token_of, url_of
from tests.secure.test_ca import mode_of, roots_of
from tests.support import PYTHON, process


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`meshlib ca …`; what it printed."""

    def call(*words: object, code: int = 0) -> str:
        assert main(["ca", *map(str, words)]) == code
        said = capsys.readouterr()
        return said.out if code == 0 else said.out + said.err

    return call


@pytest.fixture
def folder(run: Callable[..., str], tmp_path: Path) -> Path:
    """A CA that was just made."""
    run("init", tmp_path / "ca", "--trust-domain", "shop.internal")
    return tmp_path / "ca"


# ---------------------------------------------------------------------------------------------------- one machine


def test_commands_lead_from_nothing_to_a_service_with_a_certificate(run: Callable[..., str], tmp_path: Path) -> None:
    """init says what comes next, issue prints what goes into mesh.yaml, list shows what is out."""
    folder = tmp_path / "ca"
    assert f"meshlib ca issue {folder}" in run("init", folder, "--trust-domain", "shop.internal")
    printed = run("issue", folder, "orders", "web", "--ttl", "24h", "--namespace", "prod")
    assert f"identity: {{folder: {folder / 'identities'}}}" in printed
    assert sorted(path.name for path in (folder / "identities" / "orders").iterdir()) == [
        "bundle.pem", "key.pem", "svid.pem",
    ]  # fmt: skip
    listed = json.loads(run("list", folder, "--json"))
    assert [entry["id"] for entry in listed] == [
        "spiffe://shop.internal/ns/prod/sa/orders",
        "spiffe://shop.internal/ns/prod/sa/web",
    ]
    assert all(entry["serial"] in printed for entry in listed)
    assert "(in 24.0 hours)" in run("list", folder)


def test_list_shows_the_newest_of_each_service_unless_asked_for_all(run: Callable[..., str], tmp_path: Path) -> None:
    """A renewed certificate replaces its forerunner in the list."""
    folder = tmp_path / "ca"
    run("init", folder, "--trust-domain", "shop.internal")
    assert "Nothing was issued yet" in run("list", folder)
    run("issue", folder, "orders", "orders", "web")
    assert (
        len(json.loads(run("list", folder, "--json"))),
        len(json.loads(run("list", folder, "--json", "--all"))),
    ) == (2, 3)


def test_rotate_tells_the_next_step_and_updates_the_services(run: Callable[..., str], tmp_path: Path) -> None:
    """Without --step it only tells; each step publishes or issues what the next one needs."""
    folder = tmp_path / "ca"
    bundle = folder / "identities" / "orders" / "bundle.pem"
    run("init", folder, "--trust-domain", "shop.internal")
    run("issue", folder, "orders")
    old = bundle.read_bytes()
    assert f"Next: meshlib ca rotate {folder} --step begin" in run("rotate", folder)
    assert bundle.read_bytes() == old
    assert "--step activate" in run("rotate", folder, "--step", "begin")
    assert len(roots_of(bundle.read_bytes())) == 2
    CertificateAuthority.create(None, "shop.internal").write("stranger", folder / "identities")
    printed = run("rotate", folder, "--step", "activate")
    assert ("anew in" in printed, "or it was revoked: stranger." in printed) == (True, True)
    assert "--step finish" in printed
    assert "is activated" in run("rotate", folder)
    run("rotate", folder, "--step", "finish")
    (root,) = roots_of(bundle.read_bytes())
    leaf, issuer = x509.load_pem_x509_certificates((folder / "identities" / "orders" / "svid.pem").read_bytes())
    leaf.verify_directly_issued_by(issuer)
    issuer.verify_directly_issued_by(root)
    assert bundle.read_bytes() != old


@pytest.mark.parametrize("text", ["9y", "d", "-1d", "1", "", "1e3s"])
def test_lengths_of_time_without_a_known_unit_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Argparse ends with exit code 2 and names the forms."""
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["ca", "issue", str(tmp_path), "orders", f"--ttl={text}"])
    assert stop.value.code == 2
    assert "90d, 24h, 30m" in capsys.readouterr().err


def test_init_says_what_may_go_into_a_safe(run: Callable[..., str], tmp_path: Path) -> None:
    """And its help says how."""
    assert "root.key is not needed from day to day" in run("init", tmp_path / "ca", "--trust-domain", "shop.internal")
    assert "mv FOLDER/root.key /media/safe/" in run("init", "--help")


def test_renew_issues_what_is_due_and_refreshes_the_rest(run: Callable[..., str], folder: Path) -> None:
    """From a timer: nothing is due after an issue; a name or --all makes it so."""
    run("issue", folder, "orders", "web")
    svid = folder / "identities" / "orders" / "svid.pem"
    before = svid.read_bytes()
    assert "Renewed 0;" in run("renew", folder)
    assert svid.read_bytes() == before
    assert "Renewed 1;" in run("renew", folder, "orders")
    assert svid.read_bytes() != before
    assert "Renewed 2;" in run("renew", folder, "--all", "--ttl", "24h")
    assert "Not renewed: nobody" in run("renew", folder, "nobody")
    assert [entry["state"] for entry in json.loads(run("list", folder, "--json", "--all"))].count("superseded") == 3


def test_publish_brings_lost_files_back(run: Callable[..., str], folder: Path) -> None:
    """Roots and revocations, into every folder."""
    run("issue", folder, "orders", "web")
    run("revoke", folder, "web")
    for name in ("bundle.pem", "crl.pem"):
        (folder / "identities" / "orders" / name).unlink()
    assert "2 folders" in run("publish", folder)
    for name in ("bundle.pem", "crl.pem"):
        assert (folder / "identities" / "orders" / name).read_bytes() == (folder / name).read_bytes()


def test_revoke_tells_what_it_took_back_and_publishes_it(run: Callable[..., str], folder: Path) -> None:
    """By name, with a reason; `list` shows it, and `renew` leaves it alone."""
    run("issue", folder, "orders", "web")
    said = run("revoke", folder, "orders", "--reason", "keyCompromise")
    (entry, other) = json.loads(run("list", folder, "--json"))
    assert f"Revoked {ORDERS}, serial {entry['serial']}" in said
    assert (entry["state"], other["state"]) == ("revoked", "valid")
    (crl, _) = certificates.crls_of((folder / "identities" / "web" / "crl.pem").read_bytes())
    assert [certificates.serial_text(each.serial_number) for each in crl] == [entry["serial"]]
    assert "Not renewed: orders" in run("renew", folder, "orders")
    assert "no valid certificate" in run("revoke", folder, "orders", code=1)
    assert "revoked" in run("list", folder)


def test_one_spoiled_folder_is_told_at_the_end(run: Callable[..., str], folder: Path) -> None:
    """All others are renewed and get what was revoked; the exit code says that something is left to do."""
    run("issue", folder, "billing", "orders", "web")
    own = folder / "identities"
    (own / "billing" / "svid.pem").write_text("half a file")
    before = (own / "orders" / "svid.pem").read_bytes()
    said = run("renew", folder, "--all", code=1)
    assert ("Renewed 2;" in said, str(own / "billing") in said) == (True, True)
    assert (own / "orders" / "svid.pem").read_bytes() != before
    assert "Revoked" in run("revoke", folder, "web", code=1)
    assert (own / "orders" / "crl.pem").read_bytes() == (folder / "crl.pem").read_bytes()
    assert "1 of the services' folders" in run("publish", folder, code=1)


def test_revoke_takes_a_token_back_that_was_not_used_yet(run: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    """Also where there is no certificate yet; a second time there is nothing."""
    run("token", folder, "orders")
    assert "tokens that were not used yet are taken back" in run("revoke", folder, "orders")
    assert "no valid certificate" in run("revoke", folder, "orders", code=1)


def test_rotate_can_fetch_the_roots_key_for_a_moment(run: Callable[..., str], folder: Path) -> None:
    """To renew the issuer; it isn't copied."""
    safe = folder.parent / "safe"
    safe.mkdir(mode=0o700)
    (folder / "root.key").rename(safe / "root.key")
    assert "--root-key FILE" in run("rotate", folder, "--issuer", code=1)
    assert "is good until" in run("rotate", folder, "--issuer", "--root-key", safe / "root.key")
    assert not (folder / "root.key").exists()


def test_audit_prints_the_log_and_filters_it(run: Callable[..., str], folder: Path) -> None:
    """By event (and its family), service and time; as lines of JSON on request."""
    run("issue", folder, "orders", "web")
    run("token", folder, "orders")
    run("revoke", folder, "web")
    assert [line.split()[1] for line in run("audit", folder).splitlines()] == [
        "create", "issue", "issue", "token.made", "revocation",
    ]  # fmt: skip
    assert [line.split()[1] for line in run("audit", folder, "--event", "token", "--event", "create").splitlines()] == [
        "create", "token.made",
    ]  # fmt: skip
    entries = [json.loads(line) for line in run("audit", folder, "--service", ORDERS, "--json").splitlines()]
    assert [entry["event"] for entry in entries] == ["issue", "token.made"]
    assert run("audit", folder, "--since", "0.001s") == ""
    assert len(run("audit", folder, "--since", "1h").splitlines()) == 5


def test_audit_prints_nothing_that_steers_the_terminal(run: Callable[..., str], folder: Path) -> None:
    """What was refused may have been chosen by an attacker."""
    CertificateAuthority.open(folder).refuse("csr.identity", why="a\x1b]0;owned\x07\nissue  service=x")
    said = run("audit", folder, "--event", "refusal")
    assert "why=a?]0;owned??issue" in said
    assert len(said.splitlines()) == 1


def test_audit_verifies_the_chain(run: Callable[..., str], folder: Path) -> None:
    """Exit code 1 and the line where it was broken; a hash that was noted shows that the end was cut off."""
    run("issue", folder, "orders", "web")
    said = run("audit", folder, "--verify")
    head = said.split("head ")[1].strip()
    assert ("3 entries: the chain is whole." in said, re.fullmatch("[0-9a-f]{64}", head) is not None) == (True, True)
    assert "whole" in run("audit", folder, "--head", head)
    log = folder / "issued.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b"sa/orders", b"sa/ordres"))
    assert "line 3: it is not bound to the line before" in run("audit", folder, "--verify", code=1)
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert "its end was cut off" in run("audit", folder, "--verify", "--head", head, code=1)


def test_jwt_prints_a_token_and_nothing_else(run: Callable[..., str], folder: Path) -> None:
    """For five minutes or as told, in the namespace that was told; the log tells of it, and of no part of it."""
    web = "spiffe://shop.internal/ns/prod/sa/web"
    said = run("jwt", folder, "orders", "--audience", web, "--audience", "jobs")
    token = said.removesuffix("\n")
    assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", token)
    for audience in (web, "jobs"):
        claims = jwt_svid.validated(token, TokenKeys(folder).jwks, "shop.internal", audience)
        assert (claims["sub"], claims["exp"] - claims["iat"]) == (ORDERS, 300)
    for domain, audience in (("shop.internal", "payments"), ("other.internal", "jobs")):
        with pytest.raises(Refused):
            jwt_svid.validated(token, TokenKeys(folder).jwks, domain, audience)
    other = run("jwt", folder, "web", "--audience", "jobs", "--ttl", "1h", "--namespace", "prod").strip()
    claims = jwt_svid.validated(other, TokenKeys(folder).jwks, "shop.internal", "jobs")
    assert (claims["sub"], claims["exp"] - claims["iat"]) == (web, 3600)
    (line, _) = run("audit", folder, "--event", "jwt").splitlines()
    assert ("jwt.issue" in line, f"audiences=['{web}', 'jobs']" in line, "expires=" in line) == (True, True, True)
    assert not any(part in (folder / "issued.jsonl").read_text() for part in token.split("."))
    assert len(json.loads(TokenKeys(folder).jwks)["keys"]) == 1


def test_jwt_is_for_somebody_and_ends_within_an_hour(
    run: Callable[..., str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is on standard output, and nothing in the log, where it is refused."""
    assert main(["ca", "jwt", str(folder), "orders"]) == 2
    assert "--audience" in capsys.readouterr().err
    for words in (("--audience", ""), ("--audience", "web", "--ttl", "61m"), ("--audience", "web", "--ttl", "0s")):
        assert main(["ca", "jwt", str(folder), "orders", *words]) == 1
        assert capsys.readouterr().out == ""
    assert main(["ca", "jwt", str(folder), "../ca", "--audience", "web"]) == 1
    assert run("audit", folder, "--event", "jwt") == ""


# ---------------------------------------------------------------------------------------------------- several machines


def test_token_goes_to_standard_output_or_to_a_private_file(run: Callable[..., str], folder: Path) -> None:
    """Nothing but the token is on standard output."""
    token = Token.parse(run("token", folder, "orders", "--namespace", "prod", "--address", "https://ca.host:8444"))
    assert (token.spiffe_id, token.address) == ("spiffe://shop.internal/ns/prod/sa/orders", "https://ca.host:8444")
    out = folder / "orders.token"
    assert run("token", folder, "orders", "--out", out) == ""
    assert (mode_of(out), out.read_text().startswith(PREFIX)) == (0o600, True)
    assert "no address of a CA" in run("token", folder, "orders", "--address", "ca.host", code=1)


def test_enroll_makes_the_files_of_a_service(run: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    """It prints what goes into mesh.yaml, and the token is gone."""
    authority = CertificateAuthority.open(folder)
    with serving(Service(authority)) as server:
        run("token", folder, "orders", "--address", url_of(server), "--out", folder / "orders.token")
        said = run("enroll", folder / "orders.token", "--out", tmp_path / "there")
    assert f'identity: {{ca: "{url_of(server)}", state: {tmp_path / "there"}}}' in said
    assert sorted(path.name for path in (tmp_path / "there" / "orders").iterdir()) == [
        "bundle.pem", "crl.pem", "key.pem", "svid.pem",
    ]  # fmt: skip
    assert not (folder / "orders.token").exists()


def test_enroll_takes_a_token_from_standard_input(
    run: Callable[..., str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no file with it, used or refused."""
    import io

    token = token_of(CertificateAuthority.open(folder))
    with serving(Service(CertificateAuthority.open(folder))) as server:
        for code in (0, 1):
            monkeypatch.setattr("sys.stdin", io.StringIO(token.text + "\n"))
            said = run("enroll", "-", "--ca", url_of(server), "--out", tmp_path / "there", code=code)
            assert not (tmp_path / "there" / ".token").exists()
    assert "was used already" in said


@pytest.mark.parametrize("text", ["", "mesh1.x", "not a token"])
def test_enroll_refuses_what_is_no_token(run: Callable[..., str], tmp_path: Path, text: str) -> None:
    """Before anybody is asked."""
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    assert "no token of `meshlib ca token`" in run("enroll", file, "--ca", "https://127.0.0.1:1", code=1)


def test_enroll_must_know_where_the_ca_is(run: Callable[..., str], folder: Path) -> None:
    """From the token or the command line."""
    run("token", folder, "orders", "--out", folder / "orders.token")
    assert "--ca https://ca.host:8444" in run("enroll", folder / "orders.token", code=1)


def test_serve_tells_the_way_for_two_machines(run: Callable[..., str]) -> None:
    """All commands and lines that it takes are in its help."""
    said = run("serve", "--help")
    for words in (
        "meshlib ca init",
        "meshlib ca serve",
        "meshlib ca token",
        'identity: {ca: "https://ca.host:8444", token: orders.token}',
    ):
        assert words in said
    assert "was off for longer" in said


def test_serve_runs_until_it_is_told_to_end(run: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    """It says where it listens and what its fingerprint is, issues for an hour if told so, and ends with code 0 on SIGTERM."""
    words = (PYTHON, "-c", "import sys; from meshlib.cli import main; sys.exit(main())")
    with process(*words, "ca", "serve", str(folder), "--listen", "127.0.0.1:0", "--ttl", "1h") as child:
        assert child.stdout is not None
        first, second = child.stdout.readline(), child.stdout.readline()
        port = int(re.findall(r"serves on 127\.0\.0\.1:([0-9]+)\.", first)[0])
        (root,) = roots_of((folder / "bundle.pem").read_bytes())
        assert certificates.fingerprint_of(root) in second
        run("token", folder, "orders", "--out", folder / "orders.token")
        run("enroll", folder / "orders.token", "--ca", f"https://127.0.0.1:{port}", "--out", tmp_path / "there")
        leaf = x509.load_pem_x509_certificate((tmp_path / "there" / "orders" / "svid.pem").read_bytes())
        life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
        assert life.total_seconds() == 3600 + certificates.SKEW
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0


@pytest.mark.parametrize("text", ["8444", "host", "host:", ":8444", "host:99999", "::1:8444", "a b:1", "https://host:1"])
def test_addresses_to_listen_on_have_a_host_and_a_port(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Argparse ends with exit code 2 and names the forms."""
    assert main(["ca", "serve", "folder", "--listen", text]) == 2
    assert "0.0.0.0:8444, [::]:8444" in capsys.readouterr().err


def test_every_action_has_help_that_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line of it is longer than 120 characters, and each action is named by the first page."""
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["ca", "--help"]) == 0
    page = capsys.readouterr().out
    actions = ("init", "issue", "renew", "publish", "revoke", "rotate", "list", "audit", "serve", "token", "enroll", "jwt")
    for action in actions:
        assert re.search(rf"^    {action} ", page, re.MULTILINE)
        assert main(["ca", action, "--help"]) == 0
        assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 120
