"""Can a mesh be seen at work within a minute?

A shop is started, all in mode enforce, from one mesh.yaml and a CA made for the occasion: `storefront` (FastAPI),
three processes of `orders` (Flask; two are v1, one is v2 with a tenth of the traffic) and two of `inventory` (gRPC).
Customers buy, and five things happen, a to e; `PARTS` in screen.py names them. Every number is measured while it
happens: failures and latencies by the customers (load.py), orders that were executed twice in the database of
`orders`, serial numbers and refusals on the wire (wire.py), the rest by the metrics of the processes. The last line
is one JSON object; the exit status is 0 only if it says that all went well.

Is it fair? Both sides call the same processes at the same rate, and the service treats both alike: it executes a key
once. The mesh sends the key, since its retries of a POST count on it; by_hand.py doesn't, since nothing in its
libraries asks for one, and it has switches (DEMO_PEER_KEY, DEMO_PEER_OTHER) that make it better. The mesh's calls
have the longer way, by storefront and inventory. And it can fail: with DEMO_RETRY=0 the mesh repeats nothing, and
calls are lost. With DEMO_AGENT=1 a node agent issues the identities and makes the calls of all services; it is restarted
in part b, and the result has to be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.shop import wire
from examples.shop.figures import Calls
from examples.shop.fleet import HERE, Fleet
from examples.shop.screen import Board, Screen, Side, ms
from examples.shop.shop import LISTENERS, Shop, server_name

RATE = float(os.environ.get("DEMO_RATE", "80"))
RETRY = int(os.environ.get("DEMO_RETRY", "1"))
HAS_AGENT = os.environ.get("DEMO_AGENT") == "1"

# For each part the seconds that it needs at least, and its share of what there is.
LEAST = {"a": 3.0, "b": 12.0, "c": 3.0, "d": 6.0, "e": 1.0}
SHARE = {"a": 0.10, "b": 0.47, "c": 0.08, "d": 0.23, "e": 0.12}
DOWN_SECONDS = 3.0
LAP_SECONDS = 10.0


class Demo:
    """One run, from a shop at rest to a report."""

    def __init__(self, shop: Shop, seconds: float) -> None:
        self.shop = shop
        self.length = {part: max(least, SHARE[part] * seconds) for part, least in LEAST.items()}
        self.board = Board(sum(self.length.values()))
        self.screen = Screen(self.board)
        self.mesh, self.hand = Calls(), Calls()
        self.since_b = self.until_b = float("inf")
        self.retries_before_b = 0
        self.refused = 0
        self.rotations = 0

    async def load(self, name: str, calls: Calls) -> None:
        """Run a load until it is told to stop, and take down what it reports."""
        async for line in self.shop.fleet.processes[name].lines():
            calls.take(json.loads(line))

    async def watch(self) -> None:
        """Look at all metrics twice a second, and draw four times a second."""
        while True:
            await self.shop.meters.look()
            for _ in range(2):
                self.refresh()
                self.screen.draw()
                await asyncio.sleep(0.25)

    def refresh(self) -> None:
        self.board.edges = self.shop.meters.edges()
        if self.board.part != "b" or not self.hand.all:
            return
        for side, calls, retries, open_ones in (
            ("hand", self.hand, self.hand.retries, self.hand.open_breakers()),
            ("mesh", self.mesh, self.shop.meters.retries() - self.retries_before_b, self.shop.meters.open_breakers()),
        ):
            summary = calls.summary(self.since_b, self.until_b)
            self.board.sides[side] = Side(summary, retries, self.shop.twice(side), f"{open_ones} open" if open_ones else "closed")

    # --- the script

    async def run(self) -> None:
        """Parts a to e, under load all the time."""
        await self.shop.start()
        self.board.started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            shoppers = group.create_task(self.load("shopper", self.mesh))
            watch = group.create_task(self.watch())
            try:
                for part, script in (
                    ("a", self.part_a),
                    ("b", self.part_b),
                    ("c", self.part_c),
                    ("d", self.part_d),
                    ("e", self.part_e),
                ):
                    end = time.monotonic() + self.length[part]
                    self.screen.begin(part)
                    await script(group, end)
                    await asyncio.sleep(max(0.0, end - time.monotonic()))
            finally:
                for name in ("shopper", "by-hand"):
                    self.shop.fleet.processes[name].signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(shoppers), 20)
                await self.shop.meters.look()
                self.refresh()
                watch.cancel()

    async def part_a(self, group: asyncio.TaskGroup, end: float) -> None:
        """The difference between orders.py and what is left of it without the mesh, a whole application too."""
        after = (HERE / "orders.py").read_text().splitlines()
        self.screen.say("a", *two_lines(after))
        self.screen.say("a", "", "and `gunicorn orders:app` became `meshlib serve orders:app`; the rest stands in mesh.yaml.")

    async def part_b(self, group: asyncio.TaskGroup, end: float) -> None:
        """Kill and restart one v1 process as often as there is time for, at least once, with both loads running."""
        hand = group.create_task(self.load("by-hand", self.hand))
        while not self.hand.all:
            await asyncio.sleep(0.05)
        self.since_b, self.retries_before_b = time.monotonic(), self.shop.meters.retries()
        self.screen.say("b", f"both sides: {RATE:.0f} calls a second, three of four of them purchases (POST)")
        victim = self.shop.fleet.processes["orders-a"]
        while True:
            await asyncio.sleep(1.5)
            pid = victim.child.pid if victim.child else 0
            victim.kill()
            self.shop.meters.of["orders-a"].began_anew()
            self.screen.say("b", f"orders v1 at {victim.address} is killed (SIGKILL, process {pid})")
            await asyncio.sleep(DOWN_SECONDS)
            victim.start()
            await victim.ready()
            self.screen.say("b", "it is started again")
            await self.until_used_again()
            if self.shop.has_agent:
                await self.restart_agent()
            if time.monotonic() + LAP_SECONDS > end:
                break
        await asyncio.sleep(1.0)
        self.until_b = time.monotonic()
        self.shop.fleet.processes["by-hand"].signal(signal.SIGTERM)
        await hand
        self.refresh()
        for label, side in (("by hand", self.board.sides["hand"]), ("mesh", self.board.sides["mesh"])):
            s = side.summary
            self.screen.say(
                "b",
                f"{label + ':':8} {s.calls} calls, {s.failed} failed, {side.twice} orders executed twice, "
                f"{s.slow} over 200 ms, p99 {ms(s.p99)}",
            )

    async def restart_agent(self) -> None:
        """Stop the node agent as an upgrade does, and start it again. The calls go on in the processes meanwhile."""
        agent = self.shop.fleet.processes["agent"]
        agent.signal(signal.SIGTERM)
        while agent.is_running:
            await asyncio.sleep(0.05)
        self.screen.say("b", "the node agent has been stopped (SIGTERM): the processes make their calls themselves")
        await asyncio.sleep(1.0)
        before = self.shop.meters.by_agent()
        agent.start()
        await agent.ready()
        began = time.monotonic()
        while self.shop.meters.by_agent() <= before and time.monotonic() < began + 8:
            await asyncio.sleep(0.1)
        self.screen.say("b", f"it is started again; calls go by it again after {time.monotonic() - began:.1f} s")

    async def until_used_again(self) -> None:
        """Wait until no breaker is open any more on either side, and tell how long each side took; 8 s at most."""
        began = time.monotonic()
        waiting = {"the mesh": self.shop.meters.open_breakers, "by hand": self.hand.open_breakers}
        while waiting and time.monotonic() < began + 8:
            await asyncio.sleep(0.1)
            for side in [side for side, open_breakers in waiting.items() if not open_breakers()]:
                del waiting[side]
                self.screen.say("b", f"    {side}: calls go to it again after {time.monotonic() - began:.1f} s")

    async def part_c(self, group: asyncio.TaskGroup, end: float) -> None:
        """The newsletter may look but not order; whom no rule names may nothing; who has no certificate gets no answer.

        The caller is told that it isn't allowed, and nothing about rules; the service's log has the rule.
        """
        questions = (
            ("GET", "http://orders/items/7"),
            ("POST", "http://orders/orders"),
            ("GET", "http://storefront/items/7"),
        )
        for (method, url), answer in zip(questions, await self.shop.ask("newsletter", *questions), strict=True):
            called = url.split("/")[2]
            self.screen.say(
                "c", f"newsletter: {method} {url.removeprefix('http://')}: {answer['status']} {title(answer['body'])}"
            )
            if answer["status"] == 403:
                self.refused += 1
                self.screen.say("c", f"    log of {called}: {self.shop.refusal(called, 'newsletter')}")
        address = self.shop.fleet.processes["orders-b"].address
        heard = await wire.answers_strangers(address, server_name("orders"))
        self.refused += not heard
        self.screen.say("c", f"somebody without a certificate: {heard or 'the handshake fails'}")

    async def part_d(self, group: asyncio.TaskGroup, end: float) -> None:
        """A new root joins, signs, and stays alone; each step waits until every process has taken the one before."""
        began, before = time.monotonic(), await self.shop.serials()
        steps: tuple[tuple[str, Callable[[], None], Callable[[Path], object]], ...] = (
            ("1. a second root joins every bundle", self.shop.ca.begin_rotation, self.shop.ca.publish),
            (
                "2. it signs from now on: every service gets a new certificate",
                self.shop.ca.activate_rotation,
                self.shop.ca.reissue,
            ),
            ("3. the old root leaves every bundle", self.shop.ca.finish_rotation, self.shop.ca.publish),
        )
        for what, step, hand_out in steps:
            taken = self.shop.meters.rotations()
            step()
            hand_out(self.shop.identities)
            took = await self.until_taken(taken)
            self.screen.say("d", f"{what} ({took:.1f} s until all {len(taken)} processes had it)")
        after = await self.shop.serials(self.shop.ca.bundle.decode())
        self.rotations += all(after[name] != before[name] for name in LISTENERS)
        self.screen.say("d", "serial numbers on the wire; the new ones are vouched for by the new root alone:")
        self.screen.say("d", *(f"    {name:12} {before[name][-12:]} > {after[name][-12:]}" for name in LISTENERS))
        failed = self.mesh.summary(since=began).failed
        self.screen.say("d", f"calls that failed meanwhile: {failed}")

    async def until_taken(self, before: dict[str, int]) -> float:
        """Wait until every process says that it has taken a new identity; how long it took."""
        began = time.monotonic()
        while time.monotonic() < began + 10:
            now = self.shop.meters.rotations()
            if all(now.get(name, 0) > count for name, count in before.items()):
                return time.monotonic() - began
            await asyncio.sleep(0.1)
        raise RuntimeError("not every process took its new identity within 10 s: " + str(self.shop.meters.rotations()))

    async def part_e(self, group: asyncio.TaskGroup, end: float) -> None:
        """The mesh's own account of a retried call, as the storefront kept it; a purchase rather than a look."""
        (answer,) = await self.shop.ask("shopper", ("GET", "http://storefront/debug/retried"))
        accounts: list[str] = json.loads(answer["body"])
        if not accounts:
            self.screen.say("e", "no call was retried" + (": retries are off (DEMO_RETRY=0)" if not RETRY else ""))
            return
        self.screen.say("e", *max(accounts, key=lambda text: ("POST" in text, len(text))).splitlines())

    def result(self) -> dict[str, Any]:
        mesh, hand = self.mesh.summary(), self.hand.summary()
        return {
            "calls": mesh.calls,
            "failed": mesh.failed,
            "duplicates": self.shop.twice("mesh"),
            "lost": self.shop.missing(self.mesh.bought()),
            "peer_calls": hand.calls,
            "peer_failed": hand.failed,
            "peer_duplicates": self.shop.twice("hand"),
            "peer_slow": hand.slow,
            "slow": mesh.slow,
            "retries": self.shop.meters.retries(),
            "refused_as_intended": self.refused,
            "mtls_share": self.shop.meters.mtls_share(),
            "ejections": self.shop.meters.ejections(),
            "rotations": self.rotations,
            **({"by_agent": self.shop.meters.by_agent()} if self.shop.has_agent else {}),
            "p50_ms": round(mesh.p50 * 1000, 1),
            "p99_ms": round(mesh.p99 * 1000, 1),
            "peer_p50_ms": round(hand.p50 * 1000, 1),
            "peer_p99_ms": round(hand.p99 * 1000, 1),
        }


def is_well(result: dict[str, Any]) -> bool:
    none = ("failed", "duplicates", "lost")
    some = ("calls", "ejections", "rotations", "refused_as_intended", *(("by_agent",) if HAS_AGENT else ()))
    return all(result[name] == 0 for name in none) and all(result[name] >= 1 for name in some) and result["mtls_share"] == 1.0


def two_lines(after: list[str]) -> list[str]:
    """What was added to orders.py to put it into the mesh."""
    return [line for line in difflib.unified_diff(without_mesh(after), after, "orders.py", "orders.py", n=1, lineterm="")]


def without_mesh(source: list[str]) -> list[str]:
    """The same file as it was before; tests/test_demo.py runs it, to be sure that it is a whole application."""
    return [line for line in source if "meshlib" not in line]


def title(body: str) -> str:
    """What a refusal tells the caller, from its problem document (RFC 9457); "" of an answer that is none."""
    with contextlib.suppress(ValueError):
        return str(json.loads(body).get("title", ""))
    return ""


async def main(seconds: float) -> int:
    """Run the demo; the exit status. Ctrl-C and errors end it as time does: with a report, and nothing left behind."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="meshlib-demo-") as name, Fleet(Path(name)) as fleet:
        demo = Demo(Shop(Path(name), fleet, RATE, RETRY, has_agent=HAS_AGENT), seconds)
        script = asyncio.create_task(demo.run())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, script.cancel)
        with demo.screen:
            try:
                await script
            except asyncio.CancelledError:
                problems.append("the demo was interrupted")
            except Exception as error:
                causes = error.exceptions if isinstance(error, ExceptionGroup) else [error]
                problems += [f"the demo failed: {type(cause).__name__}: {cause}" for cause in causes]
        demo.screen.report()
        for begun, text in demo.mesh.errors[:5]:
            problems.append(f"a call failed at {begun - demo.board.started:.1f} s: {text}")
        for problem in problems:
            demo.screen.print(problem)
        result = demo.result()
    print(json.dumps(result), flush=True)
    return 0 if is_well(result) and not problems else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(float(os.environ.get("DEMO_SECONDS", "45")))))
