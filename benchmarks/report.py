"""What was measured, what is wrong with it, and how it is shown: pure functions from rounds to text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.load import Load
from benchmarks.subjects import Counts

BEGIN, END = "<!-- gateway -->", "<!-- /gateway -->"
RATIOS = (("c", "b"), ("d", "f"), ("d", "e"))
HEADER = ("", "server", "requests/s", "p50 ms", "p99 ms", "CPU µs/request", "errors")


class Exact(msgspec.Struct, frozen=True):
    """A second run on the same state, with no request cut off: `asked`, `answered` rightly, and events added."""

    asked: int
    answered: int
    events: int


class Round(msgspec.Struct, frozen=True):
    """One subject once. `answered` are all good answers of the round, first one and warm-up included.

    `cut_off` is the most requests that were on their way when wrk stopped: they may be billed, and nobody counted them.
    """

    load: Load
    cpu_us: int
    answered: int
    cut_off: int
    counts: Counts | None = None
    exact: Exact | None = None

    @property
    def cpu_us_per_request(self) -> float:
        return self.cpu_us / max(1, self.load.good)


class Result(msgspec.Struct, frozen=True):
    """`failure` says why rounds are missing."""

    letter: str
    name: str
    rounds: list[Round]
    failure: str = ""


class Report(msgspec.Struct, frozen=True):
    measured_at: str
    connections: int
    seconds: int
    warm_up_s: int
    machine: dict[str, str]
    versions: dict[str, str]
    results: list[Result]


def findings(report: Report) -> list[str]:
    """Everything that makes a figure worth less, or shows that a request was not kept. Empty: a clean run."""
    return [f"({result.letter}) {text}" for result in report.results for text in _findings(result)]


def _findings(result: Result) -> list[str]:
    found = [f"not measured: {result.failure}"] if result.failure else []
    for number, done in enumerate(result.rounds, 1):
        load = done.load
        if load.errors:
            found.append(
                f"round {number} had ERRORS: {load.bad_status} answers of 400 and above, {load.socket_errors} "
                f"socket errors, {load.timeouts} time-outs, beside {load.good} good answers"
            )
        found += [f"round {number}: {text}" for text in _miscounts(done)]
    return found


def _miscounts(done: Round) -> list[str]:
    counts, exact = done.counts, done.exact
    found = []
    if counts and not done.answered <= counts.accepted <= done.answered + done.cut_off:
        found.append(f"{done.answered} good answers, but {counts.accepted} accepted")
    if exact and counts and not counts.accepted == counts.finished == counts.events:
        found.append(f"{counts.accepted} accepted, {counts.finished} finished, {counts.events} events")
    if exact and not exact.asked == exact.answered == exact.events:
        found.append(f"{exact.asked} asked, {exact.answered} answered, {exact.events} events")
    return found


def render(report: Report) -> str:
    """The Markdown of a report: table, ratios, what was kept, findings, machine and versions."""
    blocks = [
        f"Measured {report.measured_at}: {report.connections} kept-alive connections in a closed loop, "
        f"{report.warm_up_s} s warm-up and {report.seconds} s measured a round, rounds interleaved; "
        "each figure is the median of the rounds (smallest–largest). Each server is one process, ours two: the loop "
        "and its journal. Load generator, proxy and backend share the machine's cores and none is pinned. Only (c) "
        "and (d) write anything durable.",
        right_table([HEADER, *(_row(result) for result in report.results)], 2),
        bullets("Ratios of requests/s, round by round", _ratios(report)),
        bullets("Kept", [line for result in report.results for line in _kept(result)]),
        bullets("FINDINGS: read these before the figures", findings(report)),
        bullets("Machine", [f"{name}: {value}" for name, value in report.machine.items()]),
        bullets("Versions", [", ".join(f"{name} {value}" for name, value in report.versions.items())]),
    ]
    return "\n\n".join(block for block in blocks if block)


def replace_section(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what stands between the markers replaced; with markers and section appended where there are none."""
    before, begins, rest = text.partition(begin)
    _, ends, after = rest.partition(end)
    if not (begins and ends):
        before, after = (text.rstrip("\n") + "\n\n" if text.strip() else ""), "\n"
    return f"{before}{begin}\n{section}\n{end}{after}"


def _row(result: Result) -> tuple[str, ...]:
    rounds = result.rounds
    if not rounds:
        return (result.letter, result.name, "not measured", "", "", "", "")
    columns: tuple[tuple[Callable[[Round], float], str], ...] = (
        (lambda done: done.load.per_second, ",.0f"),
        (lambda done: done.load.p50_us / 1_000, ".2f"),
        (lambda done: done.load.p99_us / 1_000, ".2f"),
        (lambda done: done.cpu_us_per_request, ",.0f"),
    )
    figures = [spread([read(done) for done in rounds], form) for read, form in columns]
    errors = sum(done.load.errors for done in rounds)
    return (result.letter, result.name, *figures, f"**{errors}**" if errors else "0")


def spread(values: Sequence[float], form: str) -> str:
    middle = format(statistics.median(values), form)
    return f"{middle} ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else middle


def _ratios(report: Report) -> list[str]:
    """Of the pairs that are both in the report: each round's own ratio, so that a slow minute weighs on both."""
    rounds = {result.letter: result.rounds for result in report.results}
    lines = []
    for above, below in RATIOS:
        if above in rounds and below in rounds:
            pairs = zip(rounds[above], rounds[below], strict=False)
            values = [over.load.per_second / under.load.per_second for over, under in pairs if under.load.good]
            lines.append(f"{above}/{below}: {spread(values, '.2f') if values else 'not measured'}")
    return lines


def _kept(result: Result) -> list[str]:
    lines = []
    for number, done in enumerate(result.rounds, 1):
        if done.counts:
            kept = done.counts
            lines.append(
                f"({result.letter}) round {number}: {done.answered:,} good answers, {kept.accepted:,} accepted, "
                f"{kept.finished:,} finished, {kept.events:,} usage events (at most {done.cut_off} requests were "
                "on their way when the load stopped)"
            )
        if done.exact:
            lines[-1] += f"; then {done.exact.asked:,} asked and waited for: {done.exact.events:,} usage events"
    return lines


def right_table(rows: Sequence[Sequence[str]], texts: int) -> str:
    """A Markdown table that lines up as plain text too: `texts` columns of text, then figures to the right."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    rule = ["-" * width if column < texts else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    shown = [
        _line(rows[0], widths, texts),
        "| " + " | ".join(rule) + " |",
        *(_line(row, widths, texts) for row in rows[1:]),
    ]
    return "\n".join(shown)


def _line(row: Sequence[str], widths: Sequence[int], texts: int) -> str:
    sides = "<" * texts + ">" * (len(row) - texts)
    cells = [f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=True)]
    return "| " + " | ".join(cells) + " |"


def bullets(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", "", *(f"- {line}" for line in lines)]) if lines else ""


def aim_line(name: str, found: float, aim: float, *, at_most: bool) -> str:
    """A ratio beside its aim, and whether it is met."""
    met = found <= aim if at_most else found >= aim
    return f"{name}: {found:,.2f} (aim: at {'most' if at_most else 'least'} {aim:g}; {'met' if met else 'MISSED'})"


def aligned_table(rows: Sequence[Sequence[str]], texts: int) -> str:
    """A Markdown table, its header first, that lines up as plain text too; its first `texts` columns are text."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "-|-".join("-" * (width - (at >= texts)) + ":" * (at >= texts) for at, width in enumerate(widths))
    return "\n".join([lines[0], "| " + rule.replace("-|-", " | ") + " |", *lines[1:]])
