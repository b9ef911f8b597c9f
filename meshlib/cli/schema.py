"""`meshlib schema`: what may stand in a mesh.yaml?

Prints the JSON Schema, for editors and for checks in a pipeline that has no Python. For people, `meshlib vet` is the
better answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "schema", help="print the JSON Schema of mesh.yaml", description="Print the JSON Schema (2020-12) of mesh.yaml."
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write it to a file instead")


def run(args: argparse.Namespace) -> int:
    from meshlib.config import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text, encoding="utf-8")
    return 0
