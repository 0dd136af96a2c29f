"""A log of a few thousand entries that the platform wrote, and what a verifier of others is asked about it."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from render_platform import merkle
from render_platform.clock import HOUR_US
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.note import Checkpoint, Signer
from tests.factories import START_US
from tests.platforms import make_platform, read_log, record_random

BATCHES, EVENTS_A_BATCH = 60, 5
OTHERS = 2_900


@dataclass(frozen=True)
class WrittenLog:
    """The published log of a platform; `roots` are those of every size, made from the entries' bytes."""

    state: Path
    signer: Signer
    entries: Sequence[bytes]
    roots: Sequence[bytes]
    history: Sequence[Checkpoint]

    @property
    def folder(self) -> Path:
        return self.state / "log"

    @property
    def size(self) -> int:
        return len(self.entries)

    @property
    def hashes(self) -> list[bytes]:
        return [merkle.leaf_hash(entry) for entry in self.entries]


def write_log(state: Path, rng: random.Random) -> WrittenLog:
    """Real batches first; then entries straight through the log, published at sizes that `rng` chooses."""
    with closing(make_platform(state, batch_rows=EVENTS_A_BATCH)) as platform:
        record_random(platform, BATCHES * EVENTS_A_BATCH, 1)
        platform.flush()
        sizes = {rng.randrange(OTHERS) for _ in range(12)}
        for number in range(OTHERS):
            platform.log.append(_entry(number), lambda _connection, _index: None)
            if number in sizes:
                platform.log.publish()
        platform.log.publish()
        history, signer = platform.history(), platform.log_signer
    entries = read_log(state, history[-1].size)
    peaks, roots = merkle.Peaks.empty(), [merkle.EMPTY_ROOT]
    for entry in entries:
        peaks = peaks.append(merkle.leaf_hash(entry))
        roots.append(peaks.root())
    return WrittenLog(state, signer, entries, roots, history)


def _entry(number: int) -> AuditEntry:
    hour = START_US + number * HOUR_US
    return AuditEntry(
        type="watermark",
        batch_id=f"watermark/trace/1/{number}",
        previous=FIRST_PREVIOUS,
        lane="trace/1",
        recorded_hour=hour,
        complete_until=hour + HOUR_US,
    )


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def record_of(hashes: Sequence[bytes], index: int) -> dict[str, Any]:
    """An entry, and its proof by the library."""
    return {"index": index, "proof": [base64_of(node) for node in merkle.inclusion_proof(index, hashes)]}


def pair_of(log: WrittenLog, hashes: Sequence[bytes], old: int, new: int) -> dict[str, Any]:
    """Two sizes, and the library's proof that the larger tree extends the smaller."""
    proof = merkle.consistency_proof(old, hashes[:new])
    return {
        "old": old,
        "old_root": base64_of(log.roots[old]),
        "new": new,
        "new_root": base64_of(log.roots[new]),
        "proof": [base64_of(node) for node in proof],
    }
