"""The documentation executes: the README's commands run, and what the pages name exists."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from render_platform.cli import main
from render_platform.config import Settings, load_settings
from render_platform.entries import FIELDS
from render_platform.errors import UsageError
from render_platform.events import EVENT_SCHEMA
from render_platform.gateway import jobs
from render_platform.gateway.catalogue import make_catalogue

CHECKOUT = Path(__file__).parents[1]
README = CHECKOUT / "README.md"
EVIDENCE = CHECKOUT / "docs/evidence.md"
FORMATS = CHECKOUT / "docs/formats.md"
PAGES = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
MODULES = frozenset(path.stem for path in (CHECKOUT / "render_platform").glob("[a-z]*.py"))
NAMES_OF_THE_ORIGINAL = [
    "get_queue_position",
    "process_request",
    "handle_request_success",
    "handle_request_failure",
    "cancel_job",
    "on_request_start",
    "on_request_end",
    "flush_billing_records",
    "write_record_to_cas",
    "upload_to_cas",
    "fetch_from_cas",
    "write_gpu_attestation",
    "query_cas_metrics",
    "query_clickhouse_metrics",
    "create_audit_entry",
    "verify_hash_chain",
    "query_clickhouse_aggregates",
    "query_cas_aggregates",
    "reconcile_fast_slow_path",
    "query_metrics_aggregates",
    "insert_inference_event",
    "insert_inference_event_batch",
]
TYPES = {
    pa.uuid(): "uuid",
    pa.binary(16): "bytes[16]",
    pa.timestamp("us", "UTC"): "timestamp",
    pa.string(): "text",
    pa.int64(): "int64",
}


class Block(NamedTuple):
    """A fenced block of a page, and the line that it begins on."""

    language: str
    line: int
    lines: tuple[str, ...]


class Row(NamedTuple):
    """A row of capabilities.md."""

    function: str
    place: str
    test: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    language, begin, inside = "", 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            inside.append(line)
        elif begin:
            found.append(Block(language, begin, tuple(inside)))
            begin = 0
        else:
            language, begin, inside = line[3:], number, []
    assert not begin, f"{page.name}:{begin}: the block does not end"
    return found


def table(page: Path, *header: str) -> list[list[str]]:
    """The cells of every table of a page that has this header."""
    rows: list[list[str]] = []
    inside = False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells == list(header):
            inside = True
        elif not cells:
            inside = False
        elif inside and set("".join(cells)) != {"-"}:
            assert len(cells) == len(header), line
            rows.append(cells)
    assert rows, f"{page.name} has no table {header}"
    return rows


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def code(cell: str) -> str:
    assert cell.startswith("`"), cell
    return cell.strip("`")


def resolve(name: str) -> Any:
    """What `render_platform.module.Class.method` names; a package of modules may stand between."""
    package, *rest = name.split(".")
    found: Any = importlib.import_module(package)
    while hasattr(found, "__path__") and rest:
        package = f"{package}.{rest.pop(0)}"
        found = importlib.import_module(package)
    for part in rest:
        found = getattr(found, part)
    return found


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def require_test(name: str) -> None:
    path, _, function = name.partition("::")
    assert (CHECKOUT / path).is_file(), f"{path} does not exist"
    assert not function or function in functions(CHECKOUT / path), f"{name} does not exist"


# The commands of the pages.


def command_of(line: str) -> str:
    """What is run for a line: `make demo` as its recipe is; targets that would run this test or a server are not."""
    match = re.match(r"make ([a-z]+)", line)
    if match is None:
        return line
    target = match[1]
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert recipe, f"the Makefile has no target {target}"
    if target in ("test", "up"):
        return ":"
    return recipe[1].strip().replace("$(BIN)/", "").replace("$(STATE)", "state")


def script(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language == "sh":
            yield f": {page.name} line {block.line}"
            yield from map(command_of, block.lines)


def masked(text: str) -> str:
    return re.sub(r"[0-9a-f-]{8,}", "X", text)


def promised(page: Path) -> Iterator[tuple[int, str]]:
    """Each line that the page says is printed, up to its last ellipsis: a range of hours has one inside."""
    for block in blocks(page):
        if block.language == "text":
            for number, line in enumerate(block.lines, block.line + 1):
                yield number, line.rpartition("…")[0] or line


def run_page(page: Path, tmp_path: Path) -> str:
    """Run a page's commands, one after another, in a new folder; what they print, which is what the page says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RENDER_PLATFORM_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RENDER_PLATFORM_STATE_DIR": str(tmp_path / "state"),
    }
    done = subprocess.run(
        ["bash", "-euxc", "\n".join(script(page))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    printed = masked(done.stdout)
    for number, line in promised(page):
        assert masked(line) in printed, f"{page.name}:{number}: not printed: {line}\n{done.stdout}"
    return done.stdout


@pytest.mark.timeout(180)
def test_the_commands_of_the_page_on_evidence_print_what_it_says(tmp_path: Path) -> None:
    run_page(EVIDENCE, tmp_path)
    entries, named = ((tmp_path / name).read_text().split() for name in ("entries", "named"))
    assert len(entries) == len(set(named)) > 2
    assert set(named) - set(entries) == {"0" * 64}


@pytest.mark.timeout(180)
def test_the_commands_of_the_readme_print_what_it_says(tmp_path: Path) -> None:
    printed = run_page(README, tmp_path)
    assert re.search(r"^[0-9a-f]{64}\s+[0-9a-f]{64}$", printed, re.MULTILINE) is None, "an altered object was listed"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_every_command_is_documented() -> None:
    text = README.read_text()
    documented = {code(row[0]).split()[1] for row in table(README, "command", "what it does")}
    assert documented == set(main.commands)
    for name, command in main.commands.items():
        for parameter in command.params:
            for option in (o for o in parameter.opts if o.startswith("--") and o != "--help"):
                assert option in text, f"{name} {option} is not in the README"


def test_every_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = {match for page in PAGES for match in re.findall(r"`make ([a-z]+)`", page.read_text())}
    assert {"demo", "test", "up"} <= named <= targets


# What the pages name.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_what_is_named_exists(page: Path) -> None:
    for word in re.findall(r"`([^`\n]+)`", prose(page)):
        first, dot, rest = word.removeprefix("render_platform.").partition(".")
        if word.startswith("tests/"):
            require_test(word)
        elif re.fullmatch(r"(render_platform|assets|sensors|resources|docs)/[\w/.-]+", word):
            assert (CHECKOUT / word).exists(), f"{word} does not exist"
        elif dot and first in MODULES and re.fullmatch(r"[A-Za-z_][\w.]*", rest):
            resolve(f"render_platform.{first}.{rest}")


def test_all_ten_invariants_stand_with_a_test() -> None:
    rows = table(CHECKOUT / "ARCHITECTURE.md", "#", "invariant", "enforced in", "checked by")
    assert [row[0] for row in rows] == [str(number) for number in range(1, 11)]
    for row in rows:
        assert "`tests/" in row[3] or "Not yet" in row[3], row[0]


def test_the_layers_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    checked = [
        {module.strip() for module in layer.split("|")}
        for contract in contracts
        if contract["type"] == "layers"
        for layer in contract["layers"]
    ]
    rows = table(CHECKOUT / "ARCHITECTURE.md", "layer", "modules")
    assert [set(re.findall(r"`(\w+)`", layer)) for row in rows for layer in row[1].split(";")] == checked


def test_every_decision_is_listed_and_short() -> None:
    folder = CHECKOUT / "docs/adr"
    decisions = sorted(folder.glob("0*.md"))
    listed = re.findall(r"\]\((0[^)]+)\)", (folder / "README.md").read_text())
    assert listed == [path.name for path in decisions]
    for number, path in enumerate(decisions, 1):
        text = path.read_text()
        assert text.startswith(f"# {number}. ")
        assert len(text.splitlines()) <= 40
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequences")), path.name


# Tables that derive from the code.


def test_the_columns_of_a_usage_event() -> None:
    rows = table(FORMATS, "column", "type", "unit", "null", "meaning")
    documented = [(code(name), kind, null) for name, kind, _, null, _ in rows]
    assert documented == [(f.name, TYPES[f.type], "yes" if f.nullable else "no") for f in EVENT_SCHEMA]


def test_the_fields_of_an_audit_entry() -> None:
    assert [code(row[0]) for row in table(FORMATS, "field", "type", "meaning")] == list(FIELDS)


def test_the_fields_of_an_acceptance() -> None:
    assert [code(row[0]) for row in table(FORMATS, "acceptance field", "type", "meaning")] == list(jobs.FIELDS)


def test_the_settings() -> None:
    rows = table(CHECKOUT / "docs/configuration.md", "variable", "default", "range", "meaning")
    documented = {code(row[0]).removeprefix("RENDER_PLATFORM_").lower(): row for row in rows}
    settings = [field for field in fields(Settings) if field.name != "catalogue"]
    assert list(documented) == [field.name for field in settings]
    for field in settings:
        _, default, bounds, _ = documented[field.name]
        assert ("" if default == "(empty)" else code(default)) == str(field.default)
        if bounds:
            low, high = map(int, bounds.split(" to "))
            for inside in (low, high):
                load_settings({}, None, **{field.name: inside})
            for outside in (low - 1, high + 1):
                with pytest.raises(UsageError):
                    load_settings({}, None, **{field.name: outside})


def test_the_example_of_a_catalogue_is_one(tmp_path: Path) -> None:
    text = (CHECKOUT / "docs/configuration.md").read_text()
    file = tmp_path / "example.toml"
    file.write_text(text.split("```toml\n")[1].split("```")[0])
    catalogue = make_catalogue(load_settings({}, config=file).catalogue)
    assert catalogue.resolve("black-forest-labs/FLUX.1-dev") is catalogue.models["flux-dev"]


def capabilities() -> Sequence[Row]:
    cells = table(CHECKOUT / "docs/capabilities.md", "system", "function", "lives in", "test")
    return [Row(*row[1:]) for row in cells]


@pytest.mark.parametrize("row", capabilities(), ids=lambda row: row.function.strip("`"))
def test_a_capability_lives_somewhere_and_has_a_test(row: Row) -> None:
    if "planned" in (row.place, row.test):
        assert row.place == row.test == "planned"
        return
    resolve(code(row.place))
    require_test(code(row.test))
    assert "::" in row.test


def test_every_name_of_the_original_stands_once() -> None:
    names = [row.function.strip("`") for row in capabilities() if re.fullmatch(r"`\w+`", row.function)]
    assert names == NAMES_OF_THE_ORIGINAL


def test_nothing_is_planned_that_exists() -> None:
    built = {name for module in MODULES for name in functions(CHECKOUT / f"render_platform/{module}.py")}
    planned = {row.function.strip("`") for row in capabilities() if row.place == "planned"}
    assert not planned & built & set(NAMES_OF_THE_ORIGINAL)
