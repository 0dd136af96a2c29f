"""The benchmark of flushes: a small one is measured for real, and what is wrong with one is said."""

from __future__ import annotations

from pathlib import Path

from benchmarks.whole import Case, Report, Row, measure, render

SMALL, LARGE = Case("SQLite", "folder", 1_000), Case("SQLite", "folder", 10_000)


def test_a_small_flush_is_measured_beside_its_bare_limit(tmp_path: Path) -> None:
    row = measure(SMALL, tmp_path, seed=1)
    assert not row.failure
    assert min(row.record_us, row.flush_us, row.bare_us, row.rss_mib, row.bytes) > 0
    assert list(tmp_path.iterdir()) == [], "its scratch files stay"


def test_ratios_and_aims_are_told() -> None:
    first = Row(SMALL, record_us=50_000, flush_us=20_000, bare_us=8_000, rss_mib=100, bytes=111_000)
    other = Row(Case("PostgreSQL", "folder", 1_000), 90_000, 30_000, 9_000, 110, 111_000)
    missing = Row(Case("PostgreSQL", "S3", 1_000), failure="no initdb")
    last = Row(LARGE, record_us=500_000, flush_us=180_000, bare_us=80_000, rss_mib=120, bytes=1_110_000)
    text = render(Report("2026-01-01T00:00:00Z", {"cores": "2"}, {"Python": "3"}, [first, other, missing, last]))
    assert "bare limit / flush, SQLite and a folder: 0.40 (aim: at least 0.5; MISSED)" in text
    assert "µs an event at 10,000 / at 1,000: 0.90 (aim: at most 1; met)" in text
    assert "flush on PostgreSQL and folder / on SQLite and a folder: 1.50" in text
    assert "not measured: no initdb" in text
    assert "111 bytes an event" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
