"""Acceptances in entries, by hand: what does not add up is found and named. Each of these logs is signed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from render_platform.clock import DAY_US, HOUR_US
from render_platform.entries import FIRST_PREVIOUS, MAX_ACCEPTANCES, MAX_OPEN_US, AuditEntry, parse
from render_platform.errors import Finding
from render_platform.tiles import MAX_ENTRY_BYTES
from tests.factories import replace_column
from tests.stories import HOUR, HandMade, about, named, rows_of_hour, said

G = "gw-1"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[HandMade]:
    with closing(HandMade(tmp_path)) as opened:
        yield opened


def said_of(epoch: int, first: int, through: int, still_open: int = 0, oldest: int = 0) -> dict[str, Any]:
    numbers = {"from": first, "through": through, "open": still_open, "oldest": oldest or through + 1}
    return {"gateway": G, "epoch": epoch, **numbers}


def batch(made: HandMade, seq: int, rows: int, *items: dict[str, Any], others: int = 0, **says: Any) -> AuditEntry:
    """A batch with `rows` rows of gateways' jobs, and `others` from elsewhere."""
    table = rows_of_hour(rows + others, seq)
    sources = [f"gateway/{G}"] * rows + ["meter/x"] * others
    until = HOUR + HOUR_US - 100 + seq
    return made.batch(
        HOUR, seq, replace_column(table, "source", sources), **{"acceptances": items, "complete_until": until, **says}
    )


STORIES: dict[str, tuple[list[tuple[int, list[dict[str, Any]]]], str]] = {
    "numbers are left out": (
        [(3, [said_of(1, 1, 3)]), (2, [said_of(1, 6, 7, 2, 4)])],
        "accepted jobs 4 … 5 are in no entry",
    ),
    "the first numbers are left out": ([(2, [said_of(1, 3, 4, 2, 1)])], "accepted jobs 1 … 2 are in no entry"),
    "numbers stand twice": (
        [(3, [said_of(1, 1, 3)]), (1, [said_of(1, 3, 4)])],
        "accepted jobs 3 … 3 stand in two entries",
    ),
    "an epoch is left out": (
        [(3, [said_of(1, 1, 3)]), (1, [said_of(3, 1, 1)])],
        "the acceptances of epoch 2 come next, and are left out",
    ),
    "the first epoch is left out": ([(1, [said_of(2, 1, 1)])], "the acceptances of epoch 1 come next"),
    "a job ended and has no row": (
        [(3, [said_of(1, 1, 4)])],
        "4 accepted jobs are said to have ended, and 3 rows say how",
    ),
    "a row bills a job that nobody accepted": (
        [(3, [said_of(1, 1, 2)])],
        "3 rows bill jobs of gateways, and 2 accepted jobs have ended",
    ),
    "a row stands in an entry that says nothing": (
        [(2, [said_of(1, 1, 2)]), (1, [])],
        "1 rows bill jobs of gateways, and 0 accepted jobs have ended",
    ),
    "a job that had ended is open again": (
        [(3, [said_of(1, 1, 3)]), (0, [said_of(1, 4, 4, 2, 3)])],
        "jobs that had ended are open again",
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_acceptances_that_do_not_add_up_are_found(made: HandMade, name: str) -> None:
    story, what = STORIES[name]
    entries = [batch(made, seq, rows, *items, others=1) for seq, (rows, items) in enumerate(story)]
    made.watermark(HOUR, *entries)
    outcome = made.verify(deep=True)
    found = [problem for problem in about(outcome, f"entry of {entries[-1].batch_id}") if what in problem.what]
    assert found, said(outcome)
    assert found[0].since == "2023-11-16T18:00:00Z"
    assert found[0].doubt == "that every accepted job is billed, or has failed visibly"
    assert named(outcome) == {f"entry of {entries[-1].batch_id}"}


def test_without_reading_rows_more_ends_than_rows_are_found(made: HandMade) -> None:
    first = batch(made, 0, 3, said_of(1, 1, 5), others=1)
    assert "5 accepted jobs are said to have ended, and 4 rows say how" in said(made.verify())
    made.watermark(HOUR, first, acceptances=(said_of(1, 6, 6),))
    assert "1 accepted jobs are said to have ended, and 0 rows say how" in said(made.verify())


def test_entries_that_are_full_are_balanced_with_the_next(made: HandMade) -> None:
    every = [said_of(epoch, 1, 1) for epoch in range(1, MAX_ACCEPTANCES + 11)]
    full, rest = every[:MAX_ACCEPTANCES], every[MAX_ACCEPTANCES:]
    entries = [batch(made, 0, MAX_ACCEPTANCES + 8, *full), batch(made, 1, 2, *rest)]
    made.watermark(HOUR, *entries)
    outcome = made.verify(deep=True)
    assert outcome.verified, said(outcome)
    third = batch(made, 2, 1)
    assert named(made.verify(deep=True)) >= {f"entry of {third.batch_id}"}


def test_the_first_batch_of_a_later_hour_needs_the_watermark_before_it(made: HandMade) -> None:
    first = made.batch(HOUR, 0, rows_of_hour(3, 1))
    late = made.batch(HOUR + 2 * HOUR_US, 0, rows_of_hour(3, 2, HOUR + 2 * HOUR_US))
    (problem,) = made.verify().problems
    assert problem.where == f"entry of {late.batch_id}"
    assert "the watermark of 2023-11-16T18:00:00Z is missing" in problem.what
    assert problem.since == "2023-11-16T18:00:00Z"
    assert first.batch_id


GOOD = said_of(1, 1, 3, 1, 2)


@pytest.mark.parametrize(
    "items",
    [
        [{**GOOD, "more": 1}],
        [dict(reversed(GOOD.items()))],
        [{name: value for name, value in GOOD.items() if name != "oldest"}],
        [{**GOOD, "gateway": ""}],
        [{**GOOD, "gateway": "g" * 65}],
        [{**GOOD, "gateway": "é"}],
        [{**GOOD, "gateway": 1}],
        [{**GOOD, "epoch": 0}],
        [{**GOOD, "epoch": True}],
        [{**GOOD, "from": 0}],
        [{**GOOD, "from": 5}],
        [{**GOOD, "through": 2**63}],
        [{**GOOD, "open": 3}],
        [{**GOOD, "open": -1}],
        [{**GOOD, "open": 0}],
        [{**GOOD, "oldest": 0}],
        [{**GOOD, "oldest": 4}],
        [{**GOOD, "oldest": "2"}],
        [GOOD, GOOD],
        [{**GOOD, "epoch": 2}, GOOD],
        [{**GOOD, "gateway": "z"}, GOOD],
        [said_of(epoch, 1, 1) for epoch in range(1, MAX_ACCEPTANCES + 2)],
    ],
    ids=lambda items: json.dumps(items)[:90],
)
def test_ranges_that_cannot_be_are_refused(items: list[dict[str, Any]]) -> None:
    entry = AuditEntry(type="usage_batch", batch_id="b", previous=FIRST_PREVIOUS, lane="live", acceptances=(GOOD,))
    assert parse(entry.to_bytes()) == entry
    with pytest.raises(Finding, match="acceptances does not have its type"):
        parse(replace(entry, acceptances=tuple(items)).to_bytes())


def test_an_entry_with_all_the_ranges_that_it_may_hold_is_short_enough(made: HandMade) -> None:
    most = 2**63 - 2
    items = [
        {"gateway": f"{n:064d}", "epoch": most, "from": most, "through": most, "open": most, "oldest": 1}
        for n in range(MAX_ACCEPTANCES)
    ]
    longest = replace(batch(made, 0, 1), batch_id="b" * 200, lane="trace/" + "t" * 200, acceptances=tuple(items))
    assert len(longest.to_bytes()) < MAX_ENTRY_BYTES
    assert parse(longest.to_bytes()).acceptances == tuple(items)


def test_a_job_that_is_open_for_longer_than_any_may_be_is_found(made: HandMade) -> None:
    """Numbers 1 and 2 are accepted at once, 3 a day later; 1 ends, 2 never does."""
    began = HOUR + 100
    batch(made, 0, 1, said_of(1, 1, 2, 1, 2), complete_until=began)
    batch(made, 1, 0, said_of(1, 3, 3, 2, 2), others=1, complete_until=began + DAY_US)
    batch(made, 2, 0, others=1, complete_until=began + MAX_OPEN_US)
    outcome = made.verify(deep=True)
    assert outcome.verified, said(outcome)
    assert "2 accepted jobs have not ended" in outcome.notes[0]
    batch(made, 3, 0, others=1, complete_until=began + MAX_OPEN_US + 1)
    (problem,) = made.verify(deep=True).problems
    assert (problem.where, problem.since) == (f"{G} epoch 1", "2023-11-16T18:00:00.000100Z")
    assert "job 2 was accepted, and is neither billed nor failed by 2023-11-24T18" in problem.what
    assert problem.doubt == "acceptances 2 … 3 of that epoch: 2 of them have no event"
    batch(made, 4, 1, said_of(1, 4, 3, 1, 3), complete_until=began + MAX_OPEN_US + 2)
    assert made.verify(deep=True).verified, "it has ended, however late, and 3 may wait a day longer"


def test_a_log_that_is_older_than_counting_says_from_when_on_jobs_are_counted(made: HandMade) -> None:
    batch(made, 0, 2)
    batch(made, 1, 3, said_of(7, 1, 2))
    outcome = made.verify(deep=True)
    assert outcome.verified, said(outcome)
    assert outcome.notes == [f"{G}: accepted jobs are counted from its epoch 7 on; this log is older than that"]
    batch(made, 2, 1, said_of(7, 3, 4))
    assert "2 accepted jobs are said to have ended, and 1 rows say how" in said(made.verify(deep=True))
