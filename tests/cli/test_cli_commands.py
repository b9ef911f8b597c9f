"""Do the commands do what they say, with their exit codes, and without a traceback for what can be expected?"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from meshlib import cli
from meshlib.cli import main
from meshlib.config import load

GOOD = """\
    mesh: shop
    secure: {mode: enforce, identity: {folder: ./identities}}
    services:
      web:
        listen: 127.0.0.1:8000
        secure: {mode: permissive, allow: [{name: "[b]rowsers", from: ["*"]}]}
      orders:
        discover: {static: ["127.0.0.1:8101", "127.0.0.1:8102"]}
        route:
          - {match: {methods: [GET]}, deadline: 2, retry: {attempts: 3}}
          - {}
        secure:
          allow: [{from: [web]}]
          deny: [{from: [web], methods: [DELETE]}]
    """

BAD = """\
    mesh: shop
    secure: {mode: enforce, identity: {folder: x}}
    egres: deny
    services:
      web: {listen: localhost}
    """


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MESHLIB_CONFIG", "MESHLIB_SERVICE", "MESHLIB_DEV"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "Order Desk"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def _write(text: str, name: str = "mesh.yaml") -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return file


# ---------------------------------------------------------------- the command line itself


def test_without_a_command_the_commands_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input, and help on stderr."""
    assert main([]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name, _ in cli.COMMANDS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """`meshlib --version`."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("meshlib ")


def test_help_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the whole and of a command."""
    assert (main(["--help"]), main(["vet", "--help"])) == (0, 0)
    assert "usage: meshlib vet" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["vat"], ["vet", "--jsn"], ["vet", "a", "b"], ["--nonsense"]])
def test_wrong_arguments_are_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a usage line."""
    assert main(arguments) == 2
    assert "usage: meshlib" in capsys.readouterr().err


def test_a_missing_extra_breaks_only_its_own_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extra to install; the other commands work."""

    def refuse(name: str) -> object:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    with monkeypatch.context() as patch:
        patch.setattr("meshlib.cli.importlib.import_module", refuse)
        assert main(["serve"]) == 1
    assert 'pip install "meshlib-servicemesh[serve]"' in capsys.readouterr().err
    assert main(["schema"]) == 0


def test_only_the_command_that_was_asked_for_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meshlib schema` must not pay for serve, nor break with it."""
    for name, _ in cli.COMMANDS:
        monkeypatch.delitem(sys.modules, f"meshlib.cli.{name}", raising=False)
    assert main(["schema"]) == 0
    assert [name for name, _ in cli.COMMANDS if f"meshlib.cli.{name}" in sys.modules] == ["schema"]


def test_a_file_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What the operating system refuses is told without a traceback."""
    assert main(["schema", "--out", "nowhere/schema.json"]) == 1
    assert "nowhere/schema.json: No such file or directory" in capsys.readouterr().err


# ---------------------------------------------------------------- vet


def test_vet_prints_every_mistake_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """file:line: key: message (hint), one line each."""
    file = _write(BAD)
    assert main(["vet", str(file)]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "mesh.yaml:3: egres: unknown key",
        "mesh.yaml:5: services.web.listen: 'localhost' has no port",
    ]
    assert "did you mean 'egress'?" in lines[0]
    assert "2 problems" in err


def test_vet_sums_up_a_file_without_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each service: mode, endpoints, rules; and the warnings below."""
    assert main(["vet", str(_write(GOOD))]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["mesh.yaml:"].endswith("2 services, no mistakes")
    assert " ".join(rows["orders"].split()) == "orders enforce http 2 static 2 1 to 3 2 to 15 s web; 1 deny rule"
    assert " ".join(rows["web"].split()) == "web permissive http none 1 1 15 s anyone (permissive; rules: anyone)"
    assert "warning: mesh.yaml:6: services.web.secure.mode: permissive" in out


def test_vet_tells_whom_the_whole_system_believes(capsys: pytest.CaptureFixture[str]) -> None:
    """Below the services, as far as it isn't the default; who must bring a token is seen in the row."""
    text = """\
    mesh: shop
    secure:
      mode: enforce
      identity: {folder: x}
      federation: {partner.test: {file: partner.json}}
      jwt: {auth0: {issuer: https://id.test/, audiences: [shop], jwks: "https://id.test/keys"}}
      custom: [{from: ["*"], authorizer: opa}]
    egress: {policy: deny, hosts: [api.test, "*.b.test"], credentials: [{host: api.test, env: API_KEY}]}
    services:
      web: {secure: {allow: [{from: ["*"], request_principals: ["*"]}, {from: [web]}]}}
    """
    told = {
        "other trust domains": "partner.test",
        "tokens of": "auth0",
        "egress": "denied, but to api.test, *.b.test",
        "credentials for": "api.test",
    }
    assert main(["vet", str(_write(text))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("anyone with a token, web; 1 custom rule")
    assert lines[3:] == [f"{word}: {value}" for word, value in told.items()]
    assert main(["vet", "--json", str(_write(text))]) == 0
    assert json.loads(capsys.readouterr().out)["trust"] == told


def test_vet_finds_the_file_like_load_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """MESHLIB_CONFIG, then ./mesh.yaml; no service needs to be named."""
    assert main(["vet"]) == 2
    assert "is not there" in capsys.readouterr().out
    _write(GOOD)
    assert main(["vet"]) == 0
    monkeypatch.setenv("MESHLIB_CONFIG", str(_write(BAD, "bad.yaml")))
    assert main(["vet"]) == 2


def test_vet_tells_programs_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same, as one object; the exit codes stay."""
    assert main(["vet", "--json", str(_write(BAD))]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["is_valid"] is False
    assert [(item["line"], item["key"]) for item in answer["problems"]] == [(3, "egres"), (5, "services.web.listen")]
    assert {"file", "line", "key", "message", "hint"} == set(answer["problems"][0])
    assert main(["vet", "--json", str(_write(GOOD))]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [item["service"] for item in answer["services"]] == ["web", "orders"]
    assert (answer["is_valid"], answer["problems"]) == (True, [])
    assert answer["warnings"][0]["key"] == "services.web.secure.mode"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
@pytest.mark.parametrize("has_rich", [True, False])
def test_vet_in_a_terminal_draws_a_table_and_needs_no_rich(
    has_rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of the file are no markup; without rich the plain table is printed."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    if not has_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["vet", str(_write(GOOD))]) == 0
    out = capsys.readouterr().out
    assert "orders" in out
    assert has_rich == ("│" in out)


# ---------------------------------------------------------------- schema


def test_schema_is_printed_or_written(capsys: pytest.CaptureFixture[str]) -> None:
    """The same text in both ways."""
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert main(["schema", "--out", "schema.json"]) == 0
    assert printed == Path("schema.json").read_text()


# ---------------------------------------------------------------- init


def test_init_writes_a_file_that_vet_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    """At most 30 lines, in mode observe, for a service named after the folder; and it can be loaded as it is."""
    assert main(["init"]) == 0
    text = Path("mesh.yaml").read_text()
    assert len(text.splitlines()) <= 30
    assert max(len(line) for line in text.splitlines()) <= 120
    config = load("mesh.yaml")
    assert (config.service, config.own.mode, config.own.listen) == ("order-desk", "observe", "127.0.0.1:8000")
    assert "MESHLIB_SERVICE=order-desk meshlib serve module:app" in text
    assert main(["vet", "mesh.yaml"]) == 0
    assert "wrote mesh.yaml for the service order-desk" in capsys.readouterr().out


def test_what_init_comments_out_is_right_too() -> None:
    """Uncommented, the optional lines are a valid configuration: an example that fails teaches the wrong thing."""
    assert main(["init", "--service", "orders"]) == 0
    lines = []
    for line in Path("mesh.yaml").read_text().splitlines():
        word = line.strip().removeprefix("# ")
        is_setting = word.split(":")[0] in ("identity", "egress", "deadline", "retry", "inventory", "  discover")
        lines.append(line.replace("# ", "", 1) if line.strip().startswith("# ") and is_setting else line)
    text = "\n".join(lines).replace("mode: observe ", "mode: enforce ")
    Path("full.yaml").write_text(text)
    config = load("full.yaml", service="orders")
    assert (config.own.mode, config.own.deadline) == ("enforce", 5.0)
    assert list(config.services) == ["orders", "inventory"]
    assert config.identity_folder == Path.cwd() / "identities"
    assert (config.egress, config.egress_hosts) == ("deny", ("api.example.com",))


def test_init_never_overwrites_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    """--force is needed; --out names another file."""
    _write("mine")
    assert main(["init"]) == 1
    assert "was not touched" in capsys.readouterr().err
    assert Path("mesh.yaml").read_text() == "mine"
    assert main(["init", "--out", "other.yaml"]) == 0
    assert "vet other.yaml" in Path("other.yaml").read_text()
    assert main(["init", "--force"]) == 0
    assert load("mesh.yaml").service == "order-desk"


@pytest.mark.parametrize(
    ("project", "name"),
    [
        ('[project]\nname = "Shop_Orders"\n', "shop-orders"),
        ('[tool.poetry]\nname = "billing"\n', "billing"),
        ("[project]\n", "order-desk"),
        ("not toml", "order-desk"),
        ('project = "x"\n', "order-desk"),
    ],
)
def test_init_guesses_the_name_from_the_project(project: str, name: str) -> None:
    """pyproject.toml first, then the folder; in the form of a host name."""
    _write(project, "pyproject.toml")
    assert main(["init"]) == 0
    assert load("mesh.yaml").service == name


def test_init_refuses_a_name_that_is_no_host_name(capsys: pytest.CaptureFixture[str]) -> None:
    """And says which one would do."""
    assert main(["init", "--service", "My_Service"]) == 1
    assert "For example: my-service." in capsys.readouterr().err
    assert not Path("mesh.yaml").exists()


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({"main.py": "from fastapi import FastAPI\napp = FastAPI()\n"}, "meshlib serve main:app"),
        ({"web.py": "import flask\nserver: flask.Flask = flask.Flask(__name__)\n"}, "meshlib serve web:server"),
        ({"src/shop/api.py": "from starlette.applications import Starlette\nx = Starlette()\n"}, "serve shop.api:x"),
        ({"site/__init__.py": "from flask import Flask\napp = Flask('a')\n"}, "serve site:app"),
        ({"p/wsgi.py": "application = get_wsgi_application()\n"}, "serve p.wsgi:application"),
        ({"a.py": "app = Flask('a')\n", "main.py": "app = Flask('b')\n"}, "serve main:app"),
        ({"broken.py": "def (:\n", "z.py": "app = Flask('a')\n"}, "serve z:app"),
        ({"tests/app.py": "app = Flask('a')\n", ".x/app.py": "app = Flask('a')\n"}, "serve module:app"),
        ({"venv2/pyvenv.cfg": "", "venv2/app.py": "app = Flask('a')\n"}, "serve module:app"),
        ({"app.py": "def make():\n    app = Flask('a')\n"}, "serve module:app"),
    ],
)
def test_init_tells_how_to_serve_the_application(files: dict[str, str], hint: str) -> None:
    """Found by reading, never by importing; tests, hidden folders and environments are left out."""
    for name, text in files.items():
        _write(text, name)
    assert main(["init", "--service", "a"]) == 0
    assert hint in Path("mesh.yaml").read_text()


def test_init_sees_a_grpc_server() -> None:
    """Its protocol is grpc, and it isn't served by `meshlib serve`."""
    _write("import grpc\nasync def main():\n    server = grpc.aio.server()\n", "main.py")
    assert main(["init", "--service", "a"]) == 0
    assert load("mesh.yaml").own.protocol == "grpc"
    assert "add_grpc_port" in Path("mesh.yaml").read_text()


def test_init_does_not_run_the_code_of_the_folder() -> None:
    """A module that would fail, or worse, is only read."""
    _write("from flask import Flask\nraise SystemExit('ran')\napp = Flask('a')\n", "main.py")
    assert main(["init", "--service", "a"]) == 0
    assert "serve main:app" in Path("mesh.yaml").read_text()
