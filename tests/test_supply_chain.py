"""`make audit` never takes what is not known for what is fine; `make sbom` writes what is pinned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import supply_chain

CHECKOUT = Path(__file__).parents[1]
PINNED = supply_chain.pins((CHECKOUT / "requirements.txt").read_text())
TWO = {"a-b": "1.0", "c": "2.0"}
VALIDATE = """
import json, pathlib, sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
validator = JsonStrictValidator(SchemaVersion.V1_6)
print(json.dumps([validator.validate_str(pathlib.Path(name).read_text()) is None for name in sys.argv[1:]]))
"""


def found(name: str, version: str, *vulns: str) -> dict[str, Any]:
    return {"name": name, "version": version, "vulns": [{"id": one, "fix_versions": ["9.9"]} for one in vulns]}


@pytest.mark.parametrize(
    ("dependencies", "code", "said"),
    [
        ([found("A_b", "1.0"), found("c", "2.0")], 0, "2 packages, none"),
        ([found("a.b", "1.0"), found("c", "2.0", "CVE-1")], 1, "c 2.0: CVE-1, mended in 9.9"),
        ([found("a-b", "1.0"), {"name": "c", "skip_reason": "not found"}], 3, "NOT KNOWN of 1 of 2 packages: c"),
        ([found("a-b", "1.0", "CVE-1"), {"name": "c", "skip_reason": "not found"}], 1, "NOT KNOWN of 1 of 2"),
        ([found("a-b", "1.0")], 3, "NOT KNOWN of 1 of 2 packages: c"),
        ([found("a-b", "1.0"), found("c", "1.9")], 3, "NOT KNOWN of 1 of 2 packages: c"),
        ([], 3, "NOT KNOWN of 2 of 2"),
    ],
)
def test_a_package_is_fine_only_where_it_was_looked_up(dependencies: list[Any], code: int, said: str) -> None:
    judged, lines = supply_chain.judge({"dependencies": dependencies}, TWO)
    assert judged == code
    assert any(said in line for line in lines), lines
    assert code == 0 or len(lines) > 1, "what to do is said"


def test_nothing_pinned_is_not_fine() -> None:
    assert supply_chain.judge({"dependencies": []}, {})[0] == supply_chain.UNKNOWN


def test_every_requirement_is_pinned_and_hashed() -> None:
    for name in ("requirements.txt", "requirements-tools.txt"):
        text = (CHECKOUT / name).read_text()
        entries = [
            entry for entry in text.replace("\\\n", "").splitlines() if entry and not entry.startswith((" ", "#"))
        ]
        assert len(supply_chain.pins(text)) == len(entries) > 40
        assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_a_bill_that_is_not_what_is_pinned_is_told() -> None:
    def bill(**versions: str) -> dict[str, Any]:
        return {"components": [{"name": name, "version": version} for name, version in versions.items()]}

    assert supply_chain.differences(bill(A_b="1.0", c="2.0", pip="26"), TWO) == []
    assert supply_chain.differences(bill(A_b="1.1", d="1"), TWO) == [
        "a-b: pinned 1.0, installed 1.1",
        "c: pinned 2.0, installed not",
        "d: pinned not, installed 1",
    ]


# With the tools themselves.


@pytest.fixture(scope="module")
def tools() -> Path:
    """The Python of the tools' own environment."""
    made = subprocess.run(
        ["make", ".tools/.ready", f"PYTHON={sys.executable}"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"AUDIT AND BILL OF MATERIALS NOT TESTED: the tools cannot be installed: {made.stderr[-300:]}")
    return CHECKOUT / ".tools/bin/python"


def run(tools: Path, *options: str) -> tuple[int, str]:
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [str(tools), "tests/supply_chain.py", *options],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@contextmanager
def osv(vulnerable: str) -> Iterator[tuple[str, set[str]]]:
    """A server as OSV's, which knows one vulnerability of one package; and the packages it was asked for."""
    asked: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["content-length"])))
            name = query["package"]["name"]
            asked.add(supply_chain.normal(name))
            affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": [], "versions": [query["version"]]}]
            known = {"id": "OSV-1", "summary": "bad", "details": "bad", "affected": affected, "aliases": []}
            body = json.dumps({"vulns": [known]} if name == vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_audit_finds_what_its_service_knows_and_says_where_it_knows_nothing(tools: Path) -> None:
    with osv("") as (url, asked):
        code, text = run(tools, "audit", "--service", "osv", "--osv-url", url)
        assert (code, asked) == (0, set(PINNED)), text
    with osv("uvicorn") as (url, _):
        code, text = run(tools, "audit", "--service", "osv", "--osv-url", url)
        assert code == 1
        assert f"uvicorn {PINNED['uvicorn']}: OSV-1" in text
    code, text = run(tools, "audit", "--service", "osv", "--osv-url", url)
    assert code == supply_chain.UNKNOWN, "the server is gone"
    assert "NOT KNOWN of any package" in text
    assert "SERVICE=osv" in text


def test_the_bill_of_materials_is_of_its_schema_and_lists_what_is_pinned(tools: Path, tmp_path: Path) -> None:
    file, bad = tmp_path / "one.json", tmp_path / "bad.json"
    code, text = run(tools, "sbom", str(file), "--python", sys.executable)
    assert code == 0, text
    document = json.loads(file.read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["name"] == "render-platform"
    assert "serialNumber" not in document
    assert "timestamp" not in document["metadata"]
    purls = {one["purl"] for one in document["components"]}
    assert f"pkg:pypi/uvicorn@{PINNED['uvicorn']}" in purls
    needs = {one["ref"]: one.get("dependsOn", []) for one in document["dependencies"]}
    assert any(ref.startswith("uvicorn") for ref in needs["root-component"])
    bad.write_text(json.dumps(document | {"components": [{"type": "library"}]}))
    validated = subprocess.run([str(tools), "-c", VALIDATE, str(file), str(bad)], check=True, timeout=120, stdout=-1)
    assert json.loads(validated.stdout) == [True, False]
