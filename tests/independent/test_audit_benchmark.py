"""A small run of the audit benchmark: it measures what is right, and pymerkle's trees have the roots of ours."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import audit
from benchmarks.audit import AIMS, BEGIN, END, PARTS, Report, measure_trees, ratio, render
from benchmarks.audit_subjects import (
    PYMERKLE,
    Plan,
    Row,
    Writer,
    as_events,
    files_of,
    make_tables,
    read_verifying,
    write_in_turns,
)
from benchmarks.report import replace_section
from render_platform.errors import Finding
from render_platform.verification import verify
from tests.independent.tools import CACHE

PLAN = Plan(events=1_200, batch_rows=500, entries=40, documents=20, recorded=600, rounds=2)


@pytest.fixture(scope="module")
def report() -> Report:
    found = audit.run(PLAN, CACHE / "audit", 1)
    if missing := [row.failure for row in found.rows if row.failure]:
        pytest.skip(f"OTHERS' TOOLS NOT RUN: {missing[0]}")
    return found


def test_everything_is_measured_in_one_run(report: Report) -> None:
    counted = {part: {row.count for row in report.rows if row.part == part} for part in PARTS}
    assert counted == {"verify": {1_200}, "append": {40}, "prove": {40}, "write": {20, 600, 1_200}}
    assert [len(row.us) for row in report.rows if row.part == "verify"] == [2, 2, 1]
    assert all(ratio(report.rows, aim) for aim in AIMS)
    assert (report.files, report.versions["pymerkle"]) == (3 * 4 + 3 * 2 + 1, PYMERKLE[0][-5:])


def test_the_table_lines_up_and_says_each_aim(report: Report) -> None:
    text = render(report)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(report.rows)
    assert len({len(line) for line in table}) == 1
    for aim in AIMS:
        assert f"- {aim.name} / {aim.under}: " in text
    rows = [Row("verify", AIMS[0].name, 69, us=[1_000_000]), Row("verify", AIMS[0].under, 100, us=[1_000_000])]
    assert audit._aim(rows, AIMS[0]).endswith("0.69 (aim: at least 0.7; MISSED)")
    assert audit._aim([], AIMS[0]).endswith("not measured")


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = replace_section("# Figures\n", "one", BEGIN, END)
    assert text == f"# Figures\n\n{BEGIN}\none\n{END}\n"
    assert replace_section(text + "after\n", "two", BEGIN, END) == f"# Figures\n\n{BEGIN}\ntwo\n{END}\nafter\n"


def test_the_events_are_valid_and_add_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    made = [event for _, table in make_tables(700, 500, rng) for event in as_events(table)]
    assert len({event.event_id for event in made}) == 700
    with closing((writer := Writer(tmp_path / "w")).database):
        rows = write_in_turns(writer, tmp_path / "naive", PLAN, rng)
        assert [row.count for row in rows] == [20, 1_200]
        assert len(list((tmp_path / "naive").iterdir())) == 20
        outcome = verify(writer.evidence(), deep=True)
        assert outcome.verified
        assert (outcome.batches, outcome.deep_records) == (3, 1_200)


def test_evidence_that_does_not_verify_is_no_figure(tmp_path: Path) -> None:
    with closing((writer := Writer(tmp_path / "w")).database):
        write_in_turns(writer, tmp_path / "naive", PLAN, np.random.default_rng(1))
        assert read_verifying(writer, True, 1_200) > 0
        with pytest.raises(Finding, match="1200 of 1201"):
            read_verifying(writer, False, 1_201)
        largest = max(files_of(writer), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
        with pytest.raises(Finding, match="digest"):
            read_verifying(writer, False, 1_200)


def test_without_pymerkle_its_rows_say_why(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where its folder would be")
    rows = measure_trees(tmp_path, tmp_path / "cache", PLAN, random.Random(1))
    failed = [row for row in rows if row.failure]
    assert [(row.part, row.us) for row in failed] == [("append", []), ("prove", [])]


def test_the_command_prints_the_table(tmp_path: Path) -> None:
    sizes = "--events 200 --batch-rows 100 --entries 5 --documents 5 --recorded 100 --rounds 1"
    done = CliRunner().invoke(audit.main, [*sizes.split(), "--cache", str(CACHE / "audit")])
    assert done.exit_code in (0, 1), done.output
    assert "| verify | verification, digests" in done.output
