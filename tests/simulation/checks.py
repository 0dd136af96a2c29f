"""What must hold at the end of a seed, whatever has struck: by code that shares nothing with what wrote it.

The stores are laid out as files, and read by tests/platforms.py's checker: hashlib, json and pyarrow alone. On some
seeds the library's own verification and receipts are asked as well.
"""

from __future__ import annotations

import base64
import hashlib
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

from render_platform.events import UsageEvent
from render_platform.evidence import Verification
from render_platform.pipeline import Platform
from render_platform.receipt_verifier import verify_receipt
from render_platform.receipts import Receipts
from tests.platforms import check_evidence, read_log, tree_hash
from tests.simulation.story import CUSTOMERS, Story
from tests.simulation.world import Violation

_BLOB = re.compile(r"sha256/([0-9a-f]{2})/([0-9a-f]{62})")


def check(story: Story) -> None:
    state = story.template.folder
    _lay_out(story, state)
    _check_content(story)
    if story.published_size():
        _check_log(story, state)
        _check_by_library(story)
    elif known := story.told.accepted.keys() - story.told.lost:
        raise Violation(f"{len(known)} accepted events, and no log")
    _check_verdicts(story)
    _check_secrets(story)


def _lay_out(story: Story, state: Path) -> None:
    for name in ("log", "blobs"):
        shutil.rmtree(state / name, ignore_errors=True)
    for name, data in story.objects().items():
        path = state / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _check_content(story: Story) -> None:
    """Content is its address."""
    for name, data in story.objects().items():
        if match := _BLOB.fullmatch(name.removeprefix("blobs/")):
            require(hashlib.sha256(data).hexdigest() == match[1] + match[2], f"{name} holds other bytes")


def _check_log(story: Story, state: Path) -> None:
    """Each accepted event is in one batch, as recorded; the log is whole, and denies nothing that was published."""
    vkey = story.template.vkey
    try:
        entries = check_evidence(state, vkey, _recorded(story))
    except (AssertionError, OSError) as error:
        raise Violation(f"the evidence does not hold: {str(error)[:2_000]}") from error
    raw = read_log(state, len(entries))
    for note in story.told.checkpoints:
        _, size, root = note.decode().split("\n")[:3]
        good = int(size) <= len(raw) and base64.b64encode(tree_hash(raw[: int(size)])).decode() == root
        require(good, f"the log was forked: it is not what was published at size {size}")


def _recorded(story: Story) -> list[UsageEvent]:
    """What has to be in the log: all that was accepted, but for what a restore has cost.

    A recovery may raise the time of what the log had not; SQL says to when.
    """
    held, told, found = story.held(), story.told, []
    for event_id, event in (told.accepted | told.doubtful).items():
        if event_id in told.lost and event_id not in held:
            continue
        later = held.get(event_id, (0, ""))[0] if story.restored else 0
        found.append(replace(event, recorded_at=max(event.recorded_at, later)))
    return found


def _check_by_library(story: Story) -> None:
    """Its own verification on some seeds, and one receipt."""
    rng = random.Random(f"{story.world.seed}/library")
    deep, verified, receipt = rng.random() < 0.03, rng.random() < 0.2, rng.random() < 0.15
    if deep or verified:
        found = story.step("A", "verify", lambda platform: platform.verify(deep=deep))
        good = isinstance(found, Verification) and not found.problems
        require(good, f"verify says: {found.problems if isinstance(found, Verification) else found}")
    known = sorted(story.told.accepted.keys() - story.told.lost)
    if receipt and known:
        event_id = rng.choice(known)

        def act(platform: Platform) -> str:
            return Receipts(platform.database, platform.cas, platform.log_objects).of_event(event_id)

        proven = verify_receipt(str(story.step("A", "receipt", act)), [story.template.vkey])
        require(proven.event["event_id"] == str(event_id), "the receipt is another event's")


def _check_verdicts(story: Story) -> None:
    """Unknown is not zero: what could not be read was never called equal, nor different."""
    for one in story.told.verdicts:
        said = one.status in ("reconciled", "discrepant")
        require(not said or one.equal == (one.status == "reconciled"), f"a wrong verdict: {one}")
        require(not one.final or one.events == one.known, f"a verdict on other events than there were: {one}")
        require(one.struck or one.status != "unavailable", f"unavailable, and nothing had struck: {one}")


def _check_secrets(story: Story) -> None:
    secrets = (*story.template.secrets, *CUSTOMERS)
    for text in story.told.errors:
        require(not any(secret in text for secret in secrets), "an error tells a secret")
    for name, data in story.objects().items():
        require(not any(secret.encode() in data for secret in secrets), f"{name} tells a secret")


def require(good: bool, what: str) -> None:
    if not good:
        raise Violation(what)
