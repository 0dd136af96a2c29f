"""Rules about the files themselves: where they are, how long, how many, and what none of them holds."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
LAYER = ("assets", "sensors", "resources")
TOP = (*LAYER, "render_platform", "tests", "docs", "definitions.py", "workspace.yaml", "pyproject.toml", "Makefile")
MAX_LINES, MAX_README_LINES = 400, 150
MAX_FILES = {"library": 50, "gateway": 50, "charges and operations": 20, "dagster": 25}
REGISTRIES = [
    "".join(parts)
    for parts in (
        ("py", "pi.org"),
        ("py", "pi.python.org"),
        ("python", "hosted.org"),
        ("npm", "js.org"),
        ("npm", "js.com"),
        ("yarn", "pkg.com"),
        ("crates", ".io"),
        ("ruby", "gems.org"),
        ("ana", "conda.org"),
        ("conda", ".io"),
        ("proxy.go", "lang.org"),
        ("maven", ".org"),
        ("docker", ".io"),
        ("nu", "get.org"),
    )
]
"""Hosts of package registries, in pieces: this file must not name them either."""


def sources() -> list[Path]:
    """Every source file of the library and the Dagster layer."""
    folders = [CHECKOUT / name for name in ("render_platform", *LAYER)]
    return [CHECKOUT / "definitions.py", *(path for folder in folders for path in sorted(folder.rglob("*.py")))]


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sources():
        yield str(path.relative_to(CHECKOUT)), ast.parse(path.read_text(), str(path))


def committed() -> list[Path]:
    """What git holds, and what it would be given: untracked files that it does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listed, cwd=CHECKOUT, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("COMMITTED FILES NOT CHECKED: this folder is no git checkout")
    paths = [CHECKOUT / name.decode() for name in done.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def imported(tree: ast.Module) -> Iterator[str]:
    """The top-level name of each import, wherever it stands, and of each module that is imported by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


def caught(handler: ast.ExceptHandler) -> list[str]:
    if handler.type is None:
        return ["everything"]
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return [ast.unparse(kind).rpartition(".")[2] for kind in kinds]


def only_raises_again(handler: ast.ExceptHandler) -> bool:
    """`except BaseException: …; raise` swallows nothing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_the_top_level_is_what_the_map_says() -> None:
    assert [name for name in TOP if not (CHECKOUT / name).exists()] == []


def test_no_source_file_is_long() -> None:
    lines = {str(path.relative_to(CHECKOUT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def part_of(name: str) -> str:
    """Which part a source file belongs to (docs/adr/0014-size.md, 0026-charges-and-operations-apart.md)."""
    if name.startswith("render_platform/gateway/"):
        return "gateway"
    if name.startswith(("render_platform/charges/", "render_platform/operations/")):
        return "charges and operations"
    return "library" if name.startswith("render_platform/") else "dagster"


def test_there_are_few_source_files() -> None:
    holding = Counter(
        part_of(name)
        for name, tree in trees()
        if [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    )
    assert holding.keys() == MAX_FILES.keys()
    assert {part: count for part, count in holding.items() if count >= MAX_FILES[part]} == {}


def test_each_source_file_says_what_it_is_for() -> None:
    assert [name for name, tree in trees() if not ast.get_docstring(tree)] == []


def test_no_check_is_an_assert() -> None:
    """`python -O` drops them."""
    found = [
        f"{name}:{node.lineno}" for name, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_nothing_catches_everything() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and {"everything", "Exception", "BaseException"} & set(caught(node))
        and not (caught(node) == ["BaseException"] and only_raises_again(node))
    ]
    assert found == []


def test_the_library_never_imports_dagster_nor_its_layer() -> None:
    forbidden = {*LAYER, "definitions"}
    found = [
        (name, module)
        for name, tree in trees()
        if name.startswith("render_platform/")
        for module in imported(tree)
        if module in forbidden or module.startswith("dagster")
    ]
    assert found == []


def test_nothing_but_the_tests_imports_the_tests() -> None:
    assert [name for name, tree in trees() if "tests" in set(imported(tree))] == []


def test_no_file_names_a_package_registry() -> None:
    found = [
        (str(path.relative_to(CHECKOUT)), host)
        for path in committed()
        for text in [path.read_bytes().decode(errors="replace").lower()]
        for host in REGISTRIES
        if host in text
    ]
    assert found == []


def test_the_readme_is_short() -> None:
    readme = CHECKOUT / "README.md"
    assert len(readme.read_text().splitlines()) <= MAX_README_LINES
