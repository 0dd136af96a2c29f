"""Fuzz the parsers for a while: `python -m tests.fuzz --seconds 600 [--seed N] [TARGET…]`; `make fuzz SECONDS=…`.

Prints how many inputs each target took, and ends with 1 at the first defect, which it writes to a file.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz_targets import Target, make_targets

MOST_S = 2.0
"""CPU time that one input may take."""


class Defect(Exception):
    """An input that a parser does not survive."""

    def __init__(self, target: Target, data: bytes, why: str) -> None:
        super().__init__(f"{target.name}: {why}; {len(data)} bytes: {data[:300]!r}")
        self.data = data


def try_one(target: Target, data: bytes) -> bool:
    """Whether `data` was read; Defect where it was neither read nor refused, or took too long."""
    began_s, good = time.process_time(), True
    try:
        target.read(data)
    except target.errors as error:
        good = False
        if not str(error):
            raise Defect(target, data, "an error without a message") from error
    except BaseException as error:
        raise Defect(target, data, f"{type(error).__name__}: {error}"[:500]) from error
    if (took_s := time.process_time() - began_s) > MOST_S:
        raise Defect(target, data, f"it took {took_s:.1f} s")
    return good


def fuzz(target: Target, rng: random.Random, seconds: float, most: int = sys.maxsize) -> tuple[int, int]:
    """Inputs tried and inputs read, in `seconds` of CPU time or `most` inputs."""
    until_s, tried, read = time.process_time() + seconds, 0, 0
    while tried < most and time.process_time() < until_s:
        read += try_one(target, target.mutated(rng))
        tried += 1
    return tried, read


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the parsers of outside bytes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all of them, if none is named")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time in all")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder:
        known = make_targets(Path(folder))
        names = given.targets or sorted(known)
        for name in names:
            rng = random.Random(f"{given.seed}/{name}")
            try:
                tried, read = fuzz(known[name], rng, given.seconds / len(names))
            except Defect as defect:
                path = Path(tempfile.gettempdir(), f"fuzz-{name}")
                path.write_bytes(defect.data)
                print(f"{defect}\nthe input is in {path}")
                return 1
            print(f"{name:16} {tried:8} inputs, {read} of them read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
