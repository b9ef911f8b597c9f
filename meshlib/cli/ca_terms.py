"""How are lengths of time, moments and folders written in `meshlib ca`?"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from meshlib.secure import ca

_LENGTH: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)")
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": ca.DAY}
_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):([0-9]{1,5})")


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the certificate authority's")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the services' folders are (default: FOLDER/identities)")


def add_namespace(parser: argparse.ArgumentParser, default: str | None = ca.NAMESPACE) -> None:
    parser.add_argument(
        "--namespace", default=default, metavar="NAME", help=f"as in mesh.yaml, secure.namespace (default: {default or 'any'})"
    )


def out_of(args: argparse.Namespace) -> Path:
    out: Path | None = args.out
    return Path(args.folder, "identities") if out is None else out


def seconds(text: str) -> float:
    match = _LENGTH.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length of time: write 90d, 24h, 30m or 60s")
    return float(match[1]) * _UNITS[match[2]]


def address(text: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[2]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address: write 0.0.0.0:8444, [::]:8444 or ca.host:8444")
    return match[1].strip("[]"), int(match[2])


def folders(served: list[Path], out: Path) -> str:
    return f"{len(served)} folders under {out}" if served else f"no folder under {out} (there is none)"


def day(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M} UTC"


def left(length: float) -> str:
    if length <= 0:
        return "(expired)"
    return f"(in {length / ca.DAY:.0f} days)" if length >= 2 * ca.DAY else f"(in {length / 3600:.1f} hours)"


def say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stdout, flush=True)
