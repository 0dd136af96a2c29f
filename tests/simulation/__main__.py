"""`make sim`: one seed, told step by step, or many with their figures."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.runs import Figures, run_seed, run_seeds


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed, step by step")
    parser.add_argument("--seeds", type=int, default=1_000, help="how many seeds (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    options = parser.parse_args()
    if options.seed is not None:
        outcome = run_seed(options.seed, print)
        print(f"seed {outcome.seed}: trace {outcome.trace}, {outcome.faults} faults in {outcome.calls} calls")
        print(f"VIOLATION: {outcome.violation}" if outcome.violation else "no violation")
        return int(bool(outcome.violation))
    began = time.monotonic()

    told = 0

    def tell(figures: Figures) -> None:
        nonlocal told
        for one in figures.violations[told:]:
            print(f"VIOLATION: make sim SEED={one.seed}: {one.violation}", flush=True)
        told = len(figures.violations)
        if figures.seeds % 500 == 0 or figures.seeds == options.seeds:
            print(
                f"{figures.seeds} seeds, {time.monotonic() - began:.0f} s, {len(figures.violations)} violations",
                flush=True,
            )

    figures = run_seeds(options.first, options.seeds, tell)
    seconds = time.monotonic() - began
    each = 1_000 * figures.cpu_s / max(1, figures.seeds)
    print(
        f"{figures.seeds} seeds in {seconds:.0f} s ({each:.0f} ms of CPU each): "
        f"{figures.events} events accepted, {figures.faults} faults in {figures.calls} calls, "
        f"{len(figures.violations)} violations"
    )
    return int(bool(figures.violations))


if __name__ == "__main__":
    sys.exit(main())
