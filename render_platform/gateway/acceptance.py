"""Signed acceptances: what a customer keeps, to convict a platform that never billed or never ran a job.

The signature is the gateway's own key's, on the canonical bytes of the acceptance as a C2SP signed note: the bytes, a
newline, a blank line and a signature line. Within an epoch `seq` counts every accepted job, so that a gap is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from render_platform import canonical
from render_platform.errors import Finding
from render_platform.gateway.jobs import Job
from render_platform.note import Signer, Verifier, open_note, sign_note

FIELDS = ("gateway", "epoch", "seq", "job_id", "request_digest", "time")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`time` is when the job was accepted, µs UTC; `request_digest` is 64 hex digits (see docs/formats.md)."""

    gateway: str
    epoch: int
    seq: int
    job_id: str
    request_digest: str
    time: int

    def to_note(self, signer: Signer) -> str:
        values = {name: getattr(self, name) for name in FIELDS}
        return sign_note(canonical.encode(values).decode() + "\n", [signer])

    @classmethod
    def open(cls, note: str, key: Verifier) -> Acceptance:
        """The acceptance that `note` holds, signed by `key`; Finding where it is not."""
        text, _ = open_note(note, [key])
        values = canonical.decode(text.removesuffix("\n").encode())
        if tuple(values) != FIELDS:
            raise Finding("the note is no acceptance: it has other fields")
        good = all(type(values[name]) is (int if name in ("epoch", "seq", "time") else str) for name in FIELDS)
        if not good:
            raise Finding("the note is no acceptance: a field has another type")
        return cls(**values)


def signing(signer: Signer, gateway_id: str, epoch: int) -> Callable[[Job], None]:
    """What signs a job's acceptance once that stands; one whose client waits on the connection needs none."""

    def sign(job: Job) -> None:
        if not job.request.direct:
            job.acceptance = acceptance_of(job, gateway_id, epoch).to_note(signer)

    return sign


def acceptance_of(job: Job, gateway_id: str, epoch: int) -> Acceptance:
    return Acceptance(gateway_id, epoch, job.seq, str(job.job_id), job.request_digest.hex(), job.accepted_us)
