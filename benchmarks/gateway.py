"""How fast the serving component is beside what it could be, and beside other gateways, on one machine in one run.

    python -m benchmarks.gateway                 all six, three rounds of ten seconds
    python -m benchmarks.gateway --only a,d,f    some of them
    python -m benchmarks.gateway --write         and put the table into docs/benchmarks.md

Needs wrk, and Node.js for Portkey's gateway; the peers are installed into the cache folder. Exit codes: 0 clean,
1 a finding (errors, counts that do not add up, a subject that could not be measured), 3 no load generator.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from benchmarks.load import apply_load, count_right_answers, wait_for_first_answer
from benchmarks.machine import CHECKOUT, collect_versions, describe_machine
from benchmarks.peers import LITELLM_VERSION, PORTKEY_VERSION
from benchmarks.report import Exact, Report, Result, Round, findings, render, replace_section
from benchmarks.subjects import Subject, make_subjects, start_bare
from render_platform.clock import US_PER_SECOND, SystemClock, iso
from render_platform.errors import PlatformError

LETTERS = "abcdef"
DOCUMENT = CHECKOUT / "docs" / "benchmarks.md"
EXACT = 1_000


@dataclass(frozen=True)
class Plan:
    """Connections, and seconds of warm-up and of measuring, of each round."""

    connections: int
    warm_up_s: int
    seconds: int


def measure_once(subject: Subject, folder: Path, plan: Plan) -> Round:
    """One round in a fresh folder: start, check, warm up, measure, stop, count what was kept."""
    with subject.start(folder) as server:
        wait_for_first_answer(server, subject.request)
        warm_up = apply_load(server, subject.request, plan.connections, plan.warm_up_s)
        before_us = server.cpu_us()
        load = apply_load(server, subject.request, plan.connections, plan.seconds)
        cpu_us = server.cpu_us() - before_us
    counts = subject.counts(folder) if subject.counts else None
    exact = measure_exact(subject, folder, plan.connections, counts.events) if counts and subject.bills else None
    return Round(load, cpu_us, 1 + warm_up.good + load.good, 2 * plan.connections, counts, exact)


def measure_exact(subject: Subject, folder: Path, connections: int, events_before: int) -> Exact:
    """Starts again on the same state and waits for each answer: nothing is cut off, so counts must be equal."""
    with subject.start(folder) as server:
        wait_for_first_answer(server, subject.request)
        answered = 1 + count_right_answers(server, subject.request, connections, EXACT)
    events = subject.counts(folder).events - events_before if subject.counts else 0
    return Exact(1 + EXACT, answered, events)


def measure_all(subjects: Sequence[Subject], rounds: int, work: Path, plan: Plan) -> list[Result]:
    """Round by round, each subject once a round. One that fails is left out of what follows, and says why.

    The folder of a good round is removed, that of a failed one stays for its logs.
    """
    done: dict[str, list[Round]] = {subject.letter: [] for subject in subjects}
    failures: dict[str, str] = {}
    for subject in subjects:
        try:
            subject.install()
        except PlatformError as error:
            failures[subject.letter] = str(error)
    for number in range(1, rounds + 1):
        for subject in subjects:
            if subject.letter in failures:
                continue
            _say(f"({subject.letter}) {subject.name}: round {number} of {rounds}")
            folder = work / f"{subject.letter}-{number}"
            folder.mkdir()
            try:
                done[subject.letter].append(measure_once(subject, folder, plan))
            except PlatformError as error:
                failures[subject.letter] = str(error)
            else:
                shutil.rmtree(folder)
    return [Result(s.letter, s.name, done[s.letter], failures.get(s.letter, "")) for s in subjects]


def run(letters: str, cache: Path, program: str, rounds: int, plan: Plan) -> Report:
    """The echo backend runs throughout; each other server only in its own rounds."""
    cache.mkdir(parents=True, exist_ok=True)
    versions = collect_versions([("litellm", LITELLM_VERSION), ("@portkey-ai/gateway", PORTKEY_VERSION)])
    measured_at = iso(SystemClock().now_us() // US_PER_SECOND * US_PER_SECOND)
    machine = describe_machine(cache)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=cache))
    with start_bare(sys.executable, "echo", work) as echo_server:
        subjects = make_subjects(sys.executable, program, cache, echo_server)
        chosen = [subject for subject in subjects if subject.letter in letters]
        results = measure_all(chosen, rounds, work, plan)
    if any(result.failure for result in results):
        _say(f"logs of what failed: {work}")
    else:
        shutil.rmtree(work)
    return Report(measured_at, plan.connections, plan.seconds, plan.warm_up_s, machine, versions, results)


def _letters(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    chosen = value.replace(",", "")
    if not chosen or set(chosen) - set(LETTERS):
        raise click.BadParameter(f"choose from {','.join(LETTERS)}")
    return chosen


def _say(text: str) -> None:
    click.echo(text, err=True)


def _write(section: str) -> None:
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    DOCUMENT.write_text(replace_section(text, section))
    _say(f"written to {DOCUMENT}")


@click.command()
@click.option("--only", "letters", default=",".join(LETTERS), callback=_letters, help="Subjects [default: all].")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--seconds", type=click.IntRange(1, 600), default=10, show_default=True, help="Measured, each round.")
@click.option("--warm-up", type=click.IntRange(1, 60), default=3, show_default=True, help="Seconds before that.")
@click.option("--connections", type=click.IntRange(1, 1_000), default=16, show_default=True)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=CHECKOUT / ".bench", help="Peers and scratch [.bench]."
)
@click.option(
    "--program",
    default=str(Path(sys.executable).with_name("render-platform")),
    help="The render-platform command to measure [default: this environment's].",
)
@click.option("--json", "as_json", is_flag=True, help="Print every round as one JSON object.")
@click.option("--write", is_flag=True, help="Also put the table into docs/benchmarks.md.")
def main(
    letters: str,
    rounds: int,
    seconds: int,
    warm_up: int,
    connections: int,
    cache: Path,
    program: str,
    as_json: bool,
    write: bool,
) -> None:
    """Measure the serving component beside bare servers and other gateways; see the module for what it needs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every server is ended
    try:
        report = run(letters, cache.absolute(), program, rounds, Plan(connections, warm_up, seconds))
    except PlatformError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
    section = render(report)
    click.echo(msgspec.json.encode(report).decode() if as_json else section)
    if write:
        _write(section)
    found = findings(report)
    if found:
        _say(f"NOT CLEAN, {len(found)} findings: " + "; ".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
