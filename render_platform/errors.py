"""The one error tree. Every error says what is wrong and what to do, and carries its exit code.

PlatformError
├── UsageError          2  what was asked for cannot be done: a wrong path, option or value
│   └── RecordError     2  a record or a row of input is not valid; names the field
├── Unavailable         3  a part could not be read or written: unknown, never zero
│   ├── Missing         3  an object that should be there is not
│   └── SequencerStopped 3 the log and its database disagree: stop before anything forks
└── Finding             1  evidence is wrong: a digest, a chain link, a signature, a count
    └── DigestMismatch  1  bytes are not what their name says
"""

from __future__ import annotations

from typing import ClassVar


class PlatformError(Exception):
    """`message` says what is wrong, `remedy` what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class UsageError(PlatformError):
    exit_code = 2


class RecordError(UsageError):
    """A field of a record is not valid; `field` names it."""

    def __init__(self, field: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{field}: {message}", remedy)
        self.field = field


class Unavailable(PlatformError):
    exit_code = 3


class Missing(Unavailable):
    """No object stands at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: missing", "restore the object from a copy")
        self.path = path


class SequencerStopped(Unavailable):
    pass


class Finding(PlatformError):
    exit_code = 1


class DigestMismatch(Finding):
    """The bytes at `path` are not those that its name promises."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}", "restore the object from a copy; do not edit evidence")
        self.path = path
