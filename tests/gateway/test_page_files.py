"""The page at `/`, its files: what they name, whom they reach, and that their verifier believes nothing altered."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from render_platform.gateway import page as module
from render_platform.gateway.page import STATIC
from tests.gateway.http import running
from tests.gateway.processes import NOWHERE
from tests.gateway.test_evidence_routes import flush, platform_of
from tests.gateway.test_page import STAGES


class Document(html.parser.HTMLParser):
    """The elements of a page; AssertionError where one is closed that is not open."""

    VOID = ("meta", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> names an attribute twice"
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts += data

    def all(self, name: str) -> list[str]:
        return [value for _, attrs in self.found if (value := attrs.get(name)) is not None]


def test_the_page_is_whole_and_reaches_nobody_else(tmp_path: Path) -> None:
    with running(tmp_path / "state") as at:
        client = at.client()
        reply = client.get("/")
        assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert (policy["default-src"], policy["script-src"], policy["frame-ancestors"]) == (
            "'none'",
            "'self'",
            "'none'",
        )
        assert "unsafe" not in reply.headers["content-security-policy"]
        page = Document(reply.body.decode())
        assert not page.scripts.strip(), "a script in the page would not run"
        assert not [name for _, attrs in page.found for name in attrs if name.startswith("on") or name == "style"]
        files = [url for url in (*page.all("src"), *page.all("href")) if not url.startswith(("#", "data:,"))]
        assert {"/page/page.js", "/page/page.css"} <= set(files)
        for url in [*files, "/page/receipt.js"]:
            assert url.startswith("/"), url
            found = client.get(url)
            assert found.status == 200
            if url.startswith("/page/"):
                assert not re.search(rb"https?:/|//\w+\.|@import|url\(", found.body), url
        assert client.get("/page/page.html").status == client.get("/page/%2e%2e%2fpage.py").status == 404


def test_the_page_is_for_everybody() -> None:
    page = Document((STATIC / "page.html").read_text())
    tags = [tag for tag, _ in page.found]
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    assert next(attrs["lang"] for tag, attrs in page.found if tag == "html") == "en"
    assert {"title", "main", "nav", "header", "footer"} <= set(tags)
    headings = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    assert set(page.all("for")) == {attrs["id"] for tag, attrs in page.found if tag == "input"}
    assert set(page.all("aria-labelledby")) <= set(ids)


def test_the_names_for_tests_are_there() -> None:
    named = re.findall(r"`([a-z_]+(?:-[a-z_]+)+)`", (module.__doc__ or "").split("For tests")[1])
    page = Document((STATIC / "page.html").read_text())
    assert len(named) > 30
    assert set(named) - {"data-testid", "data-value", "stage-state"} <= set(page.all("data-testid"))
    script = (STATIC / "page.js").read_text()
    for used in re.findall(r'(?:\$|say|showRows)\("([\w-]+)"', script):
        assert used in page.all("id"), used
    assert 'dataset.testid = "stage-state"' in script
    assert page.all("data-stage") == STAGES


# Receipts, as the page's own script verifies them.

VERIFY = """
import { readFileSync } from "node:fs";
import { verifyReceipt } from "./receipt.mjs";
const said = [];
for (const { text, keys, job } of JSON.parse(readFileSync("cases.json", "utf8"))) {
  try {
    said.push((await verifyReceipt(text, keys, job)).signed ? "signed" : "hashes");
  } catch { said.push("refused"); }
}
console.log(JSON.stringify(said));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="THE PAGE'S OWN VERIFIER NOT CHECKED: there is no node")
def test_a_receipt_is_verified_and_an_altered_one_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state, clickhouse_dsn=NOWHERE) as at, platform_of(state) as platform:
        client = at.client()
        made = [client.queue()["id"] for _ in range(5)]
        for job in made:
            client.ended(job)
        flush(state)
        key, foreign = platform.log_signer.verifier.vkey, platform.attestation_signer.verifier.vkey
        texts = [client.get(f"/jobs/{job}/receipt").body.decode() for job in made]
    cases = [{"text": text, "keys": [key], "job": job} for text, job in zip(texts, made, strict=True)]
    text, job = texts[0], made[0]
    cases += [{"text": text, "keys": [], "job": job}, {"text": text, "keys": [foreign, key], "job": job}]
    expected = ["signed"] * 5 + ["hashes", "signed"]
    cases += [{"text": text, "keys": [foreign], "job": job}, {"text": text, "keys": [key], "job": made[1]}]
    cases += [{"text": altered, "keys": [key], "job": job} for altered in altered_texts(text)]
    (tmp_path / "receipt.mjs").write_text((STATIC / "receipt.js").read_text())
    (tmp_path / "verify.mjs").write_text(VERIFY)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(["node", "verify.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected + ["refused"] * (len(cases) - len(expected))


def altered_texts(text: str) -> Iterator[str]:
    """One character of each word changed, and of each part of the extra line; and a line less, each."""
    extra = text.split("\n")[1].removeprefix("extra ")
    inner = base64.b64decode(extra).decode()
    for match in re.finditer(r"[0-9a-f]{1,64}(?=[\\\",\]}])", inner):  # numbers, ids, digests, nodes of proofs
        changed = inner[: match.start()] + ("1" if match[0][0] != "1" else "2") + inner[match.start() + 1 :]
        yield text.replace(extra, base64.b64encode(changed.encode()).decode())
    for match in re.finditer(r"\S{4,}", text):
        for at in (match.start(), (match.start() + match.end()) // 2, match.end() - 3):
            yield text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
    lines = text.splitlines(keepends=True)
    for number in range(len(lines)):
        yield "".join(lines[:number] + lines[number + 1 :])
