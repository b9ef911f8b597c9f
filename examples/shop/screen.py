"""What does a person see, while it happens and afterwards?

In a terminal one live picture (rich): the edges of the shop, the two sides, and what the present part of the demo
tells. Without a terminal plain lines, each printed when it is known. Both end with the same report, so that
everything can be read in peace. The picture is drawn when the demo says so: there is no thread that draws. Nothing is
measured here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from examples.shop.figures import Summary

PARTS = {
    "a": "two lines put a service into the mesh",
    "b": "a process is killed and started again: by hand, and through the mesh",
    "c": "an identity that isn't allowed is refused, with the rule",
    "d": "the root of the CA is rotated under load",
    "e": "explain() of a call that was retried",
}


@dataclass(frozen=True, slots=True)
class Edge:
    """Who calls whom, over the last seconds; an indented name is one endpoint of the edge above it."""

    name: str
    per_second: float
    success: float
    p50: float | None
    p99: float | None
    retries: int
    breaker: str
    mtls: float | None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two sides since the beginning of part b."""

    summary: Summary
    retries: int
    twice: int
    breaker: str


@dataclass
class Board:
    """All that can be seen. The demo writes it, the screen reads it."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    part: str = "a"
    edges: Sequence[Edge] = ()
    sides: dict[str, Side] = field(default_factory=dict)
    stories: dict[str, list[str]] = field(default_factory=lambda: {part: [] for part in PARTS})


class Screen:
    """Where the board is shown: `say` adds a line to a part's story, `draw` shows the present state."""

    def __init__(self, board: Board, out: TextIO = sys.stdout) -> None:
        self.board = board
        self.console = Console(file=out, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop") if self.console.is_terminal else None
        self.next_edges = 0.0

    def __enter__(self) -> Screen:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.update("", refresh=True)
            self.live.stop()

    def begin(self, part: str) -> None:
        self.board.part = part
        if not self.live:
            self.print(f"{self.elapsed():5.1f} s  == {part}. {PARTS[part]}")

    def say(self, part: str, *lines: str) -> None:
        for line in lines:
            self.board.stories[part].append(line)
            if not self.live:
                self.print(f"{self.elapsed():5.1f} s  {part}  {line}")

    def draw(self) -> None:
        if self.live:
            self.live.update(self.picture(), refresh=True)
        elif self.board.edges and time.monotonic() >= self.next_edges:
            self.next_edges = time.monotonic() + 5.0
            for edge in self.board.edges:
                self.print(f"{self.elapsed():5.1f} s  {plain(edge)}")

    def report(self) -> None:
        """The whole story, to be kept."""
        if self.live:
            for part, title in PARTS.items():
                self.console.print(
                    Panel(
                        story(self.board.stories[part]),
                        title=f"{part}. {title}",
                        title_align="left",
                        border_style="dim",
                    )
                )
            self.console.print(self.edges())
            self.console.print(self.sides())
        else:
            self.print("")
            for edge in self.board.edges:
                self.print(plain(edge))

    def print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.board.started

    # --- the picture

    def picture(self) -> RenderableType:
        board = self.board
        head = Text.assemble(
            ("meshlib", "bold"),
            "  a shop in a mesh, mode enforce",
            (f"   {self.elapsed():.0f} s of {board.seconds:.0f} s", "dim"),
            "   ",
        )
        for part in PARTS:
            head.append(f" {part} ", "reverse bold" if part == board.part else "bold" if part < board.part else "dim")
        # The story first; then the edges, then the two sides, as far as there is room for them.
        told = board.stories[board.part]
        wanted = min(max(len(told), 6), 26) + 3
        above: list[RenderableType] = [head]
        parts = [(self.edges, len(board.edges) + 1), (self.sides, 10)]
        for draw, height in reversed(parts) if board.part == "b" else parts:
            if wanted + height <= self.console.height:
                above.append(draw())
                wanted += height
        title = f"{board.part}. {PARTS[board.part]}"
        return Group(*above, Panel(story(told[-26:]), title=title, title_align="left", border_style="cyan"))

    def edges(self) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
        table.add_column("edge", no_wrap=True)
        for name in ("calls/s", "success", "p50", "p99", "retries", "breaker", "mTLS"):
            table.add_column(name, justify="right", no_wrap=True)
        for edge in self.board.edges:
            table.add_row(
                Text(edge.name, style="dim" if edge.name.startswith(" ") else ""),
                f"{edge.per_second:.0f}",
                Text(percent(edge.success), style="green" if edge.success == 1 else "red"),
                ms(edge.p50),
                ms(edge.p99),
                str(edge.retries),
                Text(edge.breaker, style="green" if edge.breaker in ("closed", "") else "red"),
                "" if edge.mtls is None else Text(percent(edge.mtls), style="green" if edge.mtls == 1 else "red"),
            )
        return table

    def sides(self) -> Table:
        table = Table(expand=True, header_style="bold", border_style="dim", box=box.HORIZONTALS, pad_edge=False)
        table.add_column("the same load", style="dim", width=18)
        table.add_column("httpx + tenacity + pybreaker", ratio=1)
        table.add_column("meshlib, by the storefront", ratio=1)
        for label, figure in FIGURES.items():
            table.add_row(
                label,
                *(figure(self.board.sides[side]) if side in self.board.sides else Text("–", "dim") for side in ("hand", "mesh")),
            )
        return table


def bad(count: int) -> Text:
    return Text(str(count), style="bold red" if count else "bold green")


FIGURES: dict[str, Callable[[Side], Text]] = {
    "calls": lambda side: Text(str(side.summary.calls)),
    "failed": lambda side: bad(side.summary.failed),
    "executed twice": lambda side: bad(side.twice),
    "over 200 ms": lambda side: Text(str(side.summary.slow)),
    "p50, p99": lambda side: Text(f"{ms(side.summary.p50)}, {ms(side.summary.p99)}"),
    "retries, breakers": lambda side: Text(f"{side.retries}, {side.breaker}"),
}


def story(lines: Sequence[str]) -> Text:
    """The lines of a part; a difference keeps the colours that one knows it by."""
    text = Text(overflow="fold")
    for line in lines:
        style = "green" if line.startswith("+") else "red" if line.startswith("-") else ""
        text.append(line + "\n", style)
    text.right_crop(1 if lines else 0)
    return text


def plain(edge: Edge) -> str:
    mtls = "" if edge.mtls is None else f"  mTLS {percent(edge.mtls)}"
    breaker = f"  breaker {edge.breaker}" if edge.breaker else ""
    latency = "" if edge.p50 is None else f"  p50 {ms(edge.p50)}  p99 {ms(edge.p99)}"
    rate = f"{edge.name:24} {edge.per_second:4.0f}/s  success {percent(edge.success)}"
    return f"{rate}{latency}  retries {edge.retries}{breaker}{mtls}"


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f} ms"


def percent(share: float) -> str:
    """Rounded down: 100 % means all of them."""
    return f"{int(share * 1000) / 10:g} %"
