"""What is verified, and what verification found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from render_platform.errors import PlatformError
from render_platform.note import Checkpoint, Verifier
from render_platform.objects import ObjectStore

Progress = Callable[[str, int, int], None]
"""Called with the stage, what is done and what there is."""


@dataclass(frozen=True, slots=True)
class Problem:
    where: str
    what: str


@dataclass
class Verification:
    """The outcome. Figures count what was read, good or not."""

    checkpoint: Checkpoint | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    batches: int = 0
    records: int = 0
    gpu_time_ns: int = 0
    blobs: int = 0
    deep: bool = False
    deep_batches: int = 0
    deep_records: int = 0

    @property
    def verified(self) -> bool:
        return self.checkpoint is not None and not self.problems

    def as_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "size": self.checkpoint.size if self.checkpoint else None,
            "root": self.checkpoint.root.hex() if self.checkpoint else None,
            "entries": self.entries,
            "batches": self.batches,
            "events": self.records,
            "gpu_time_ns": self.gpu_time_ns,
            "objects": self.blobs,
            "deep": self.deep,
            "rows_read": self.deep_records,
            "problems": [{"where": problem.where, "what": problem.what} for problem in self.problems],
            "notes": self.notes,
        }

    def note(self, text: str) -> None:
        """Something that a reader should know, and that is no problem; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, where: str, what: str) -> None:
        self.problems.append(Problem(where, what))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is verified, and with which keys. `history` holds earlier checkpoints that the log must still contain."""

    log: ObjectStore
    blobs: ObjectStore
    log_keys: Sequence[Verifier]
    attestation_keys: Sequence[Verifier]
    history: Sequence[Checkpoint] = ()


def said(error: PlatformError, path: str) -> str:
    """An error's message without the name of the object, which the problem names."""
    return error.message.removeprefix(f"blobs/{path}: ").removeprefix(f"{path}: ")
