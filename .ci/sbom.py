"""What is in the wheel, and what does it need? A bill of materials (CycloneDX 1.5), made from what decides it.

    sbom.py make <file>     write it: the crates of the native core (cargo metadata, Cargo.lock), the Python packages (pyproject)
    sbom.py check <folder>  look whether the wheel there holds one that is true

maturin could write the part for Rust itself, with the paths of the machine that built the wheel in it, and the crates of all
platforms. This one is the same on every machine: no paths, no time, and a serial number that is made of the content. Crates that only
work while building (macros, build scripts) have the scope `excluded`. Python packages are not in the wheel; the version is the one
that CI tests with, the property says which are allowed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import uuid
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "meshlib/_native/Cargo.toml"
PLATFORM = "x86_64-unknown-linux-gnu"
CRATE = "mesh-binding"
NAME = "meshlib-servicemesh.cdx.json"


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def crates() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The components, and what each of them needs."""
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={PLATFORM}"]
    told = json.loads(subprocess.run([*command, "--manifest-path", str(MANIFEST)], check=True, capture_output=True).stdout)
    packages = {package["id"]: package for package in told["packages"]}
    needs = {node["id"]: node["deps"] for node in told["resolve"]["nodes"]}
    (begin,) = (key for key, package in packages.items() if package["name"] == CRATE)
    scopes: dict[str, str] = {}
    todo = [(begin, "required")]
    while todo:
        key, scope = todo.pop()
        if any("proc-macro" in target["kind"] for target in packages[key]["targets"]):
            scope = "excluded"
        if scopes.get(key) in {scope, "required"}:
            continue
        scopes[key] = scope
        for need in filter(is_built_in, needs[key]):
            is_linked = any(kind["kind"] is None for kind in need["dep_kinds"])
            todo.append((need["pkg"], scope if is_linked else "excluded"))
    components = [
        {
            "type": "library",
            "bom-ref": reference(package),
            "name": package["name"],
            "version": package["version"],
            "scope": scope,
            **({"licenses": [{"expression": package["license"].replace("/", " OR ")}]} if package["license"] else {}),
            "purl": reference(package),
        }
        for package, scope in sorted(
            ((packages[key], scope) for key, scope in scopes.items()), key=lambda each: reference(each[0])
        )
    ]
    edges = [
        {
            "ref": reference(packages[key]),
            "dependsOn": sorted({reference(packages[need["pkg"]]) for need in needs[key] if is_built_in(need)}),
        }
        for key in sorted(scopes, key=lambda key: reference(packages[key]))
    ]
    return components, edges


def is_built_in(need: dict[str, Any]) -> bool:
    """Not for tests only."""
    return any(kind["kind"] != "dev" for kind in need["dep_kinds"])


def reference(package: dict[str, Any]) -> str:
    return f"pkg:cargo/{package['name']}@{package['version']}"


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def python() -> list[dict[str, Any]]:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / ".ci/constraints.txt").read_text(), re.MULTILINE))
    tested = {normalized(name): version for name, version in pinned.items()}
    components = []
    for need in sorted(project()["dependencies"]):
        parts = re.fullmatch(r"([\w.-]+)(\[[^\]]*\])?\s*(.*)", need)
        assert parts is not None, need
        name = normalized(parts[1])
        purl = f"pkg:pypi/{name}@{tested[name]}"
        allowed = {"name": "meshlib:allowed", "value": parts[3] or "*"}
        components.append(
            {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": tested[name],
                "scope": "required",
                "purl": purl,
                "properties": [allowed],
            }
        )
    return components


def made() -> dict[str, Any]:
    itself = project()
    rust, edges = crates()
    packages = python()
    purl = f"pkg:pypi/{itself['name']}@{itself['version']}"
    root = next(each["bom-ref"] for each in rust if each["name"] == CRATE)
    content: dict[str, Any] = {
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": purl,
                "name": itself["name"],
                "version": itself["version"],
                "licenses": [{"expression": itself["license"]}],
                "purl": purl,
            },
            "properties": [{"name": "meshlib:platform", "value": PLATFORM}],
        },
        "components": [*rust, *packages],
        "dependencies": [{"ref": purl, "dependsOn": sorted([root, *(each["bom-ref"] for each in packages)])}, *edges],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "serialNumber": f"urn:uuid:{serial}", "version": 1, **content}


def problems(folder: Path) -> list[str]:
    """What is wrong with the bill in the wheel."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        bills = [name for name in archive.namelist() if "/sboms/" in name]
        if [Path(name).name for name in bills] != [NAME]:
            return [f"bills of materials in the wheel: {bills}"]
        text = archive.read(bills[0]).decode()
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        needs = re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra ==)", archive.read(metadata).decode(), re.MULTILINE)
    bill = json.loads(text)
    named = {(each["name"], each["version"]) for each in bill["components"]}
    lock = tomllib.loads(MANIFEST.with_name("Cargo.lock").read_text())["package"]
    locked = {(package["name"], package["version"]) for package in lock}
    listed = {name for name, _ in named}
    wrong = [f"{name} {version} is not in Cargo.lock" for name, version in sorted(named - locked) if f"pkg:cargo/{name}@" in text]
    wrong += [f"{name} is missing" for name in ("rustls", "rustls-webpki", "ring", "pyo3", "h2", CRATE) if name not in listed]
    wrong += [f"{name} is missing" for name in needs if normalized(name) not in listed]
    wrong += ["it has a path in it"] if "file://" in text or str(ROOT) in text else []
    wrong += ["it is not what would be made now"] if bill != made() else []
    print(f"{NAME}: {len(bill['components'])} components, {len(needs)} of them Python packages")
    return wrong


def main(what: str, where: str) -> int:
    if what == "make":
        Path(where).write_text(json.dumps(made(), indent=1) + "\n")
        return 0
    found = problems(Path(where))
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
