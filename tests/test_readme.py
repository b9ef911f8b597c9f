"""Is everything that the README says true today?

Its fenced blocks are taken out and run: the service is served, the caller calls it, the ladder is climbed, the commands are typed, and
outputs are compared with what comes out now (times and ports aside). A command that no test knows fails, so that nothing can be added
untried. What is not checked: prose, and the figures of the benchmarks, which `make bench` measures.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pybreaker
import pytest
import tenacity
import yaml

import meshlib
from meshlib import cli
from meshlib.observe import names
from tests.support import (
    PYTHON,
    ROOT,
    Request,
    Scripted,
    free_port,
    identities,
    ok,
    process,
    scripted,
    wait_until_listening,
)

README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
FENCE = re.compile(r"^```(\w+) ?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [SimpleNamespace(language=found[1], title=found[2], text=found[3]) for found in FENCE.finditer(README)]
FILES = ("mesh.yaml", "orders.py", "storefront.py")
MESHLIB = str(Path(sys.executable).with_name("meshlib"))
SECTION = re.compile(r"^secure: .*$", re.MULTILINE)
# Commands that lead here, that make's environment answers, or that a test of their own runs.
ELSEWHERE = (
    *("cd meshlib", ". .venv/bin/activate", "meshlib serve orders:app", "python storefront.py", "meshlib dev -- bash"),
    *("meshlib ca serve ./ca", "maturin build", "meshlib agent run", "meshlib agent status"),
)
# What the rungs of the ladder mean: who the service sees when the caller of the mesh calls, and what a plain caller gets.
LADDER = (("", 200), ("", 200), ("storefront", 200), ("storefront", 400))


def block(title: str) -> str:
    found = [each.text for each in BLOCKS if each.title == title]
    assert len(found) == 1, f"the README has {len(found)} blocks {title!r}"
    return str(found[0])


def commands() -> list[str]:
    """Every command of the shell blocks, in order."""
    lines = [line for each in BLOCKS if each.language == "sh" for line in each.text.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&")]


def command(start: str) -> list[str]:
    """The one command that begins like this, with the `meshlib` and `python` that run this test."""
    found = {each for each in commands() if each.startswith(start)}
    assert len(found) == 1, f"the README has {len(found)} commands {start!r}"
    word, *rest = shlex.split(found.pop())
    return [{"meshlib": MESHLIB, "python": PYTHON}[word], *rest]


def rungs() -> list[str]:
    """What the table of the ladder says to put into mesh.yaml."""
    return re.findall(r"^\| \d \| `(secure: .*?)` \|", README, re.MULTILINE)


class Shop:
    """The files of the README in a folder, on free ports."""

    def __init__(self, folder: Path, rung: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.log = folder / "orders.log"
        text = block("mesh.yaml").replace("8101", str(self.port)).replace("9464", str(free_port()))
        self.text = {each: SECTION.sub(each, text) for each in (*rungs(), rung)}
        for name in ("orders.py", "storefront.py"):
            (folder / name).write_text(block(name))
        self.put(rung)

    def put(self, rung: str, file: str = "mesh.yaml") -> Path:
        (self.folder / file).write_text(self.text[rung])
        return self.folder / file

    def serve(self) -> Any:
        return process("sh", "-c", f"exec {shlex.join(command('meshlib serve'))} >{self.log} 2>&1", cwd=self.folder)

    def ask(self, file: str = "mesh.yaml") -> str:
        """Who the service says that called it."""
        mesh = meshlib.Mesh.load(self.folder / file, service="storefront")
        try:
            with mesh.sync_client() as http:
                return str(http.get("http://orders/items/7").json()["for"])
        finally:
            mesh.close()

    def ask_plainly(self) -> int:
        return httpx.get(f"http://127.0.0.1:{self.port}/items/7", trust_env=False).status_code


def until(ask: Callable[[], Any], expected: Any, seconds: float = 8.0) -> None:
    """A process takes a new file within a second: ask until the answer is the expected one."""
    end = time.monotonic() + seconds
    while (found := ask()) != expected:
        assert time.monotonic() < end, f"still {found!r}, not {expected!r}"
        time.sleep(0.1)


def measured(text: str) -> list[str]:
    """Lines without what differs from run to run: times, ports, costs, and the width of columns."""
    plain = re.sub(r"\d+(\.\d+)?( m?s\b)?", "N", text.replace("*", " "))
    return [" ".join(line.split()) for line in plain.strip().splitlines()]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """The README's service, at the top of the ladder, with the certificates of the README's commands."""
    shop = Shop(tmp_path_factory.mktemp("shop"), rungs()[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.folder)
        for line in ("meshlib ca init", "meshlib ca issue ./ca storefront"):
            assert cli.main(command(line)[1:]) == 0
    with shop.serve() as child:
        wait_until_listening(shop.port, child)
        yield shop


# ---------------------------------------------------------------- the first service and its caller


def test_the_readme_shows_the_files_of_the_first_example() -> None:
    """Who reads and who runs see the same."""
    assert {name: block(name) for name in FILES} == {name: (ROOT / "examples/first" / name).read_text() for name in FILES}


def test_client_and_server_have_at_most_ten_lines() -> None:
    """A first look is a short one; blank lines are free."""
    lengths = {name: sum(map(bool, block(name).splitlines())) for name in FILES}
    assert [name for name, length in lengths.items() if length > 10] == []


def test_the_caller_calls_the_served_service_over_mutual_tls(shop: Shop) -> None:
    """The server of the README answers its client in mode enforce, and knows who it is."""
    done = subprocess.run(command("python storefront.py"), cwd=shop.folder, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    first, title, *_ = done.stdout.splitlines()
    assert first == "200 {'item': 7, 'price': 12, 'for': 'storefront'}"
    assert title == "GET /items/7 to orders"
    assert shop.ask_plainly() == 400


def test_explain_tells_what_the_readme_shows(shop: Shop) -> None:
    """A second endpoint where nobody listens: the same story, but for its times."""
    here = f"127.0.0.1:{shop.port}"
    file = shop.folder / "two.yaml"
    file.write_text(shop.text[rungs()[-1]].replace(f'["{here}"]', f'["{here}", "127.0.0.1:{free_port()}"]'))
    for seed in range(8):  # by chance the first pick is the endpoint that is there, and there is nothing to tell
        mesh = meshlib.Mesh.load(file, service="storefront")
        mesh.engine.reseed(seed)
        with mesh.sync_client() as http:
            call = http.get("http://orders/items/7").extensions["meshlib.call"]
        mesh.close()
        if call.attempts > 1:
            break
    assert measured(call.explain()) == measured(block("explain"))


def test_a_refusal_is_logged_with_the_rule_that_the_readme_shows(shop: Shop) -> None:
    """The caller gets 403 and no rule; the log of the service has it."""
    mesh = meshlib.Mesh.load(shop.folder / "mesh.yaml", service="storefront")
    with mesh.sync_client() as http:
        answer = http.get("http://orders/prices")
    mesh.close()
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert "shop" not in answer.text
    until(lambda: block("refusal").strip() in shop.log.read_text(), expected=True)


async def test_the_other_ways_work_as_written(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, a deadline, and an httpx client of one's own."""
    monkeypatch.chdir(shop.folder)
    space: dict[str, Any] = {"meshlib": meshlib, "httpx": httpx}
    exec(block("ways"), space)
    async with space["http"] as http:
        assert (await http.get("http://orders/items/7")).json()["for"] == "storefront"
    space["mesh"].close()


async def run(code: str, **space: Any) -> dict[str, Any]:
    """A block that awaits, as if it stood in a coroutine; what it leaves behind."""
    compiled = compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if (left := eval(compiled, space)) is not None:
        await left
    return space


async def test_grpc_works_as_written(tmp_path: Path) -> None:
    """The server's block and the caller's block, with a stub as it is generated."""
    port = free_port()
    identities(tmp_path, "storefront", "inventory")
    services = {
        "storefront": {},
        "inventory": {
            "protocol": "grpc",
            "discover": {"static": [f"127.0.0.1:{port}"]},
            "secure": {"allow": [{"from": ["storefront"], "paths": ["/shop.Inventory/*"]}]},
        },
    }
    secure = {"mode": "enforce", "identity": {"folder": "./identities"}}
    file = tmp_path / "mesh.yaml"
    file.write_text(yaml.safe_dump({"mesh": "shop", "secure": secure, "services": services}))

    class Inventory:
        async def Reserve(self, request: bytes, context: Any) -> bytes:
            caller = meshlib.peer()
            return request + b" for " + (caller.service if caller else "nobody").encode()

    def add(servicer: Inventory, server: Any) -> None:
        handler = grpc.method_handlers_generic_handler(
            "shop.Inventory", {"Reserve": grpc.unary_unary_rpc_method_handler(servicer.Reserve)}
        )
        server.add_generic_rpc_handlers((handler,))

    def stub(channel: Any) -> Any:
        return SimpleNamespace(Reserve=channel.unary_unary("/shop.Inventory/Reserve"))

    served = await run(
        block("grpc-server").replace("8201", str(port)),
        mesh=meshlib.Mesh.load(file, service="inventory"),
        grpc=grpc,
        Inventory=Inventory,
        add_InventoryServicer_to_server=add,
    )
    try:
        asked = await run(
            block("grpc-caller"), mesh=meshlib.Mesh.load(file, service="storefront"), InventoryStub=stub, request=b"item 7"
        )
        assert asked["answer"] == b"item 7 for storefront"
        asked["mesh"].close()
    finally:
        await served["server"].stop(0)
        served["mesh"].close()


# ---------------------------------------------------------------- balance, admit, retry


@contextlib.contextmanager
def storefront(folder: Path, ports: dict[str, int]) -> Iterator[meshlib.Mesh]:
    """A mesh with the README's policies, in which these ports stand for those that are written; the others lead nowhere."""
    text = re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda found: str(ports.get(found[0]) or free_port()), block("policies.yaml"))
    file = folder / "mesh.yaml"
    file.write_text(text)
    mesh = meshlib.Mesh.load(file, service="storefront")
    try:
        yield mesh
    finally:
        mesh.close()


async def test_a_guard_works_as_written(tmp_path: Path) -> None:
    """It repeats what is idempotent and raises the own exception; then the breaker is open, and the last good answer stands in."""
    words: list[Any] = [ConnectionError(), 5, *[ConnectionError("no ledger")] * 3]

    async def credit(account: str) -> int:
        word = words.pop(0)
        if isinstance(word, Exception):
            raise word
        return int(word)

    with storefront(tmp_path, {}) as mesh:
        space: dict[str, Any] = {"mesh": mesh, "meshlib": meshlib, "ledger": SimpleNamespace(credit=credit)}
        exec(block("guard"), space)
        assert await space["credit"]("alice") == 5
        with pytest.raises(ConnectionError, match="no ledger") as caught:
            await space["credit"]("bob")
        assert words == []
        assert await space["credit"]("alice") == 5
        assert dict(mesh.fallbacks) == {("guard:ledger", "last_good"): 1}
        with pytest.raises(pybreaker.CircuitBreakerError) as refused:
            await space["credit"]("carol")
    assert isinstance(refused.value, meshlib.CircuitOpen)
    story = meshlib.call_of(caught.value)
    assert story is not None
    assert "failed after 3 calls" in story.explain()


async def test_calls_get_what_they_ask_for(tmp_path: Path) -> None:
    """A POST that is declared idempotent is repeated, labels choose the endpoint, and a fallback stands in. Redis is away all the while."""
    posts = 0

    async def answer(server: Scripted, request: Request) -> bytes:
        nonlocal posts
        posts += request.method == "POST"
        failed = request.method == "POST" and posts == 1
        return b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n" if failed else ok(str(server.port).encode())

    async with scripted(answer) as first, scripted(answer) as second:
        with storefront(tmp_path, {"8101": first.port, "8102": second.port}) as mesh:
            # The real strategy, a hundredth as long.
            quick = functools.partial(tenacity.wait_random_exponential, multiplier=0.01)
            space = await run(
                block("calls"),
                mesh=mesh,
                meshlib=meshlib,
                wait_random_exponential=quick,
                stop_after_delay=tenacity.stop_after_delay,
            )
    assert (space["posted"].status_code, posts) == (200, 2)
    assert space["item"].text == str(first.port)
    assert space["cart"].json() == {"items": []}
    assert space["cart"].extensions["meshlib.fallback"] == "value"


# ---------------------------------------------------------------- the ladder


def test_the_ladder_is_climbed_while_the_service_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rung means to callers what the table says, and no process is started again."""
    first, *later = rungs()
    assert len(later) == 3
    monkeypatch.chdir(tmp_path)
    shop = Shop(tmp_path, first)
    with shop.serve() as child:
        wait_until_listening(shop.port, child)
        assert (shop.ask(), shop.ask_plainly()) == LADDER[0]
        for line in ("meshlib ca init", "meshlib ca issue ./ca storefront"):
            assert cli.main(command(line)[1:]) == 0
        for number, rung in enumerate(later, start=1):
            # What rung 2 is for: a caller that took the next rung before the service did gets through.
            shop.put(rung, "ahead.yaml")
            if number > 1:
                assert shop.ask("ahead.yaml") == LADDER[number][0]
            shop.put(rung)
            until(lambda: shop.log.read_text().count("is in force"), number)
            assert (shop.ask(), shop.ask_plainly()) == LADDER[number]
        assert child.poll() is None


def test_dev_needs_no_certificates(tmp_path: Path) -> None:
    """Everything that is started under `meshlib dev` can call and be called in mode enforce."""
    shop = Shop(tmp_path, "secure: {mode: enforce}")
    serve, call = shlex.join(command("meshlib serve")), shlex.join(command("python storefront.py"))
    is_up = f"(exec 3<>/dev/tcp/127.0.0.1/{shop.port}) 2>/dev/null"
    script = f"{serve} 2>orders.log & until {is_up}; do sleep 0.05; done; {call} 2>caller.log; kill $!; wait"
    with process(*command("meshlib dev"), "-c", script, cwd=tmp_path) as child:
        out, _ = child.communicate(timeout=30)
    assert "'for': 'storefront'" in out, (tmp_path / "caller.log").read_text()
    assert "dev.meshlib.invalid" in shop.log.read_text()


# ---------------------------------------------------------------- configurations and commands


def test_every_configuration_passes_vet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one of the example at each rung of the ladder, and the one with policies, in which nothing is without effect."""
    for rung in rungs():
        shop = Shop(tmp_path, rung)
        assert cli.main(["vet", str(shop.folder / "mesh.yaml")]) == 0, capsys.readouterr().out
    file = tmp_path / "policies.yaml"
    file.write_text(block("policies.yaml"))
    capsys.readouterr()
    assert cli.main(["vet", str(file)]) == 0
    told = capsys.readouterr()
    warnings = [line for line in (told.out + told.err).splitlines() if line.startswith("warning")]
    assert [line for line in warnings if "secure.mode: observe" not in line] == []
    for name in ("enrolled.yaml", "rules.yaml", "egress.yaml", "registries.yaml", "agent.yaml"):
        file = tmp_path / name
        file.write_text(block(name))
        assert cli.main(["vet", str(file)]) == 0, capsys.readouterr().out
    # Those of serving are run in test_readme_inbound.py, and two of them are not ours to judge.
    serving = ["serving.yaml", "deployment.yaml", "compose.yaml"]
    known = ["mesh.yaml", "broken.yaml", "policies.yaml", *serving, "enrolled.yaml", "rules.yaml", "egress.yaml"]
    known += ["registries.yaml", "agent.yaml"]
    assert [each.title for each in BLOCKS if each.language == "yaml"] == known


def test_vet_tells_the_mistakes_that_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The broken configuration, word for word."""
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text(block("broken.yaml"))
    assert cli.main(["vet", "broken.yaml"]) == 2
    assert capsys.readouterr().out == block("vet")


def test_every_command_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the README's order, in one folder. A command that isn't known here is one that nobody tried."""
    monkeypatch.chdir(tmp_path)
    for line in commands():
        word, *rest = shlex.split(line)
        if word == "meshlib" and rest[0] == "ca" and rest[1] != "serve":
            assert cli.main(rest) == 0, line
        elif word == "make":
            assert rest[0] in targets(), line
        elif word == "cd" and rest != ["meshlib"]:
            assert (ROOT / rest[0]).is_dir(), line
        else:
            assert line == "cd meshlib" or line.startswith(ELSEWHERE), line
    assert (tmp_path / "identities/orders/svid.pem").exists()


@pytest.mark.parametrize("line", ["init", "vet", "schema"])
def test_commands_in_the_text_work_in_a_new_folder(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meshlib init`, then `meshlib vet` and `meshlib schema`."""
    assert f"`meshlib {line}`" in README
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MESHLIB_CONFIG", raising=False)
    if line == "vet":
        assert cli.main(["init"]) == 0
    assert cli.main([line]) == 0


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


# ---------------------------------------------------------------- names


def test_a_newcomer_copies_two_lines() -> None:
    """The first block is all that it takes."""
    first = next(each.text for each in BLOCKS if each.language == "sh").splitlines()
    assert [line.split()[0] for line in first] == ["cd", "make"]
    assert first[1] == "make demo"


def test_names_in_the_text_exist() -> None:
    """Commands, targets, metrics, and what hangs on a Mesh."""
    assert set(re.findall(r"`make ([a-z]+)", README)) <= targets()
    assert set(re.findall(r"`meshlib ([a-z]+)", README)) <= {name for name, _ in cli.COMMANDS}
    assert set(re.findall(r"`(meshlib_\w+)`", README)) <= {metric.name for metric in names.METRICS}
    assert set(re.findall(r"\bmesh\.([a-z_]+)\(", README)) <= {name for name, _ in inspect.getmembers(meshlib.Mesh)}
    modules = {"server", "testing", "identity", "resolver"}  # an import string for uvicorn, a package, groups of entry points
    assert set(re.findall(r"\bmeshlib\.([A-Za-z]+)[(`.]", README)) <= {*meshlib.__all__, *modules}


def test_links_lead_to_files() -> None:
    """Every link of README and CHANGELOG that stays in the tree."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", README + CHANGELOG) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(links) >= 5


def test_the_map_shows_folders_that_exist_and_leaves_none_out() -> None:
    """Every name of the map is there, and every folder of the package is in the map."""
    trail: list[str] = []
    shown: set[str] = set()
    for line in block("tree").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.split():
            if not name.endswith(("/", ".py")):
                break
            trail[depth:] = [name]
            shown.add("".join(trail))
    assert [path for path in sorted(shown) if not (ROOT / path).exists()] == []
    package = {f"meshlib/{file.relative_to(ROOT / 'meshlib').parts[0]}/" for file in (ROOT / "meshlib").glob("*/*.py")}
    assert package - shown == set()


def test_the_requests_way_is_the_one_of_the_package() -> None:
    """The README and the docstring of meshlib draw the same lines; each phase is a folder."""
    assert block("way") in inspect.cleandoc(meshlib.__doc__ or "").replace("\n    ", "\n") + "\n"
    phases = re.findall(r"^\| (\w+) \| .*\?", README, re.MULTILINE)
    assert phases == ["discover", "route", "retry", "balance", "admit", "secure", "observe"]
    assert all((ROOT / "meshlib" / phase / "__init__.py").exists() for phase in phases)


def test_the_figures_have_their_place() -> None:
    """Between these marks stand the numbers of `make bench`."""
    found = re.search(r"^<!-- bench:client -->\n(.*?)^<!-- /bench -->$", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert re.search(r"^\| .*mesh\.client\(\).* \| [\d,]+ \|", found[1], re.MULTILINE)


def test_the_changelog_knows_this_version() -> None:
    """Its newest version is the package's, with no section but the four."""
    versions = re.findall(r"^## (\S+)", CHANGELOG, re.MULTILINE)
    assert versions[0] == meshlib.__version__
    assert set(re.findall(r"^### (\w+)", CHANGELOG, re.MULTILINE)) <= {"Added", "Changed", "Behaviour", "Fixed"}
