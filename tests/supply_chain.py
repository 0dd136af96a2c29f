"""What the project is made of: known vulnerabilities of what is pinned, and a bill of materials. Run by `make`.

    python tests/supply_chain.py audit [--osv-url URL]     0: none is known; 1: some are; 3: it is not known of all
    python tests/supply_chain.py sbom FILE                  0: written, and it is what is pinned; 1: it is not

Runs in the environment of requirements-tools.txt (pip-audit, cyclonedx-bom), which is apart from the project's: what
looks for bad packages does not run among them. pip-audit says "No known vulnerabilities found", with exit code 0, where
its service knew none of the packages; here that is what it is: not known.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
PINNED = CHECKOUT / "requirements.txt"
INSTALLED = CHECKOUT / ".venv/bin/python"
TIMEOUT_S = 540
UNKNOWN = 3
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    """The version of each package that a requirements file pins, by its normal name."""
    return {normal(name): version for name, version in _PIN.findall(text)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def judge(document: Any, pinned: dict[str, str]) -> tuple[int, list[str]]:
    """The exit code, and what to say, of what pip-audit found: a package is fine only where it was looked up."""
    looked_up: dict[str, Any] = {}
    reasons: list[str] = []
    for one in document["dependencies"]:
        if "skip_reason" in one:
            reasons.append(one["skip_reason"])
        elif pinned.get(normal(one["name"])) == one["version"]:
            looked_up[normal(one["name"])] = one["vulns"]
    lines = [
        f"{name} {pinned[name]}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for name, vulns in sorted(looked_up.items())
        for found in vulns
    ]
    unknown = sorted(pinned.keys() - looked_up.keys())
    if unknown:
        more = " …" if len(unknown) > 5 else ""
        lines.append(f"NOT KNOWN of {len(unknown)} of {len(pinned)} packages: {', '.join(unknown[:5])}{more}")
        lines += [f"for example: {reason}" for reason in reasons[:1]]
    if any(looked_up.values()):
        return 1, [*lines, "raise these versions in requirements.in, then `make lock`"]
    if unknown or not pinned:
        return UNKNOWN, [*lines, *HELP]
    return 0, [f"{len(pinned)} packages, none with a known vulnerability"]


HELP = (
    "The data on vulnerabilities comes from the Internet: the package index's, which a mirror often lacks, or OSV's.",
    "Run this where one of them is reached, `make audit` or `make audit SERVICE=osv`, on requirements.txt as it is.",
)


def audit(service: str, osv_url: str | None) -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--disable-pip"]
    command += ["--require-hashes", "--requirement", str(PINNED), "--vulnerability-service", service]
    command += ["--osv-url", osv_url] if osv_url else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        document = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        print("NOT KNOWN of any package: the service on vulnerabilities gave no answer", *HELP, sep="\n")
        return UNKNOWN
    code, lines = judge(document, pins(PINNED.read_text()))
    print(*lines, sep="\n")
    return code


def differences(document: Any, pinned: dict[str, str]) -> list[str]:
    """Where a bill of materials is not what is pinned. pip, which installs it, may stand in it."""
    found = {normal(one["name"]): one["version"] for one in document["components"]}
    names = sorted((pinned.keys() | found.keys()) - {"pip"})
    return [
        f"{name}: pinned {pinned.get(name, 'not')}, installed {found.get(name, 'not')}"
        for name in names
        if pinned.get(name) != found.get(name)
    ]


def sbom(target: Path, python: Path) -> int:
    """Write the CycloneDX 1.6 document of what is installed, with licences and who needs whom, without a time or
    a random number in it. It is checked with CycloneDX's own schema before it is written, and with the pins after."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", str(python), "--output-reproducible", "--validate"]
    command += ["--spec-version", "1.6", "--pyproject", str(CHECKOUT / "pyproject.toml"), "--output-file", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        print(f"{target} was not written: {done.stderr.strip()[-500:]}")
        return 1
    document = json.loads(target.read_text())
    if found := differences(document, pins(PINNED.read_text())):
        print(f"{target} is not what requirements.txt pins:", *found, "run `make clean`, then again", sep="\n")
        return 1
    print(f"{target}: {len(document['components'])} components, as requirements.txt pins them")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="known vulnerabilities, and the bill of materials")
    commands = parser.add_subparsers(dest="command", required=True)
    auditing = commands.add_parser("audit")
    auditing.add_argument("--service", choices=("pypi", "osv"), default="pypi")
    auditing.add_argument("--osv-url")
    billing = commands.add_parser("sbom")
    billing.add_argument("file", type=Path)
    billing.add_argument("--python", type=Path, default=INSTALLED)
    given = parser.parse_args()
    return audit(given.service, given.osv_url) if given.command == "audit" else sbom(given.file, given.python)


if __name__ == "__main__":
    sys.exit(main())
