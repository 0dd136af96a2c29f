"""Commands for evidence: receipts, bundles, erasure, recovery, drills, orphans, witnesses and keys."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click

from render_platform import console, keyring, receipt_verifier, witness
from render_platform.audit_log import CHECKPOINT
from render_platform.bundle import BundleVerification, make_bundle, verify_bundle
from render_platform.cas import Cas, NamedDigests, collect_orphans, open_objects
from render_platform.charges.chain import rerate
from render_platform.clickhouse import open_clickhouse
from render_platform.clock import DAY_US, SystemClock, SystemIds
from render_platform.config import Settings, load_settings
from render_platform.entries import END_OF_TIME_US
from render_platform.errors import Finding, Missing, Unavailable, UsageError
from render_platform.evidence import Evidence, Verification
from render_platform.note import Verifier, WitnessKey, claimed_checkpoint, cosignatures_of, load_key, load_or_create_key
from render_platform.options import Time, json_option, print_json, state_option
from render_platform.pipeline import Platform, RoleKeys, open_platform
from render_platform.receipts import Erasure, Receipts
from render_platform.recovery import Recovery, differences, read_figures, restore_drill
from render_platform.verification import verify

_FILE = click.Path(path_type=Path)
_INPUT = click.Path(path_type=Path, exists=True, dir_okay=False)
_key_option = click.option(
    "--key",
    "vkeys",
    multiple=True,
    metavar="VKEY",
    help="Trust this key, not the folder's own: the log's; again for the attestations'.",
)


@click.command("verify")
@state_option
@click.option("--deep", is_flag=True, help="Also re-read the rows of every batch.")
@click.option("--from", "start", type=Time(), help="Only objects of this hour on; the log is checked as a whole.")
@click.option("--to", "end", type=Time(), help="Only objects of the hours before this time.")
@_key_option
@click.option("--witness", "witnesses", multiple=True, metavar="VKEY", help="A witness that must have cosigned it.")
@click.option("--quorum", type=click.IntRange(1), help="How many of the witnesses must [default: all of them].")
@click.option(
    "--remember", type=_FILE, help="A file of yours: the last checkpoint that verified; the log must extend it."
)
@json_option
def verify_command(
    state: Path | None,
    deep: bool,
    start: int | None,
    end: int | None,
    vkeys: Sequence[str],
    witnesses: Sequence[str],
    quorum: int | None,
    remember: Path | None,
    as_json: bool,
) -> None:
    """Verify the evidence, offline: log, chain, objects, batches."""
    if start is not None and end is not None and start >= end:
        raise UsageError("--from is not before --to", "give a range that holds at least one hour")
    keys = [WitnessKey.parse(vkey) for vkey in dict.fromkeys(witnesses)]
    if quorum is not None and quorum > len(keys):
        raise UsageError(f"--quorum is {quorum}, of {len(keys)} witnesses", "give --witness for each that may count")
    settings = load_settings(state_dir=state)
    evidence, notes = _pinned(settings, vkeys) if vkeys else _own(settings)
    if remember is not None and remember.exists():
        evidence = replace(evidence, history=[*evidence.history, console.remembered(remember)])
    if not evidence.history:
        notes += [f"{'' if keys else 'unwitnessed: '}no earlier checkpoint is known here; a log cut short would verify"]
    published = _published(evidence)
    outcome = _verified(evidence, deep, start, end)
    if outcome.checkpoint is not None:
        if not published or claimed_checkpoint(published) != outcome.checkpoint:
            raise Unavailable("a checkpoint was published just when this began", "run the command again")
        _check_witnesses(outcome, published, keys, quorum)
        if remember is not None and outcome.verified:
            console.remember(remember, published)
    for note in notes:
        outcome.note(note)
    if as_json:
        print_json(outcome.as_json())
    else:
        console.print_verification(console.person(), outcome)
    sys.exit(0 if outcome.verified else 1)


def _verified(evidence: Evidence, deep: bool, start: int | None, end: int | None) -> Verification:
    """With progress. Charges are rated again where all rows may be read."""
    whole = start is None and end is None
    asked = {"start_us": start or 0, "end_us": end or END_OF_TIME_US}
    with console.progress_bars() as progress:
        outcome = verify(evidence, deep=deep, **asked, only_range=not whole, progress=progress)
        if deep and whole:
            rerate(outcome, Cas(evidence.blobs), progress)
    return outcome


def _own(settings: Settings) -> tuple[Evidence, list[str]]:
    with open_platform(settings) as platform:
        return platform.evidence(), ["the keys came from the state folder itself; pin yours with --key (see `vkey`)"]


def _pinned(settings: Settings, vkeys: Sequence[str]) -> tuple[Evidence, list[str]]:
    if not settings.objects_url and not settings.log_dir.is_dir():
        raise UsageError(f"{settings.state_dir} holds no log", "give --state the folder that holds blobs/ and log/")
    keys = [Verifier.parse(vkey) for vkey in vkeys]
    attesting = [key for key in keys if key.name.endswith("/attestation")]
    signing = [key for key in keys if key not in attesting]  # a role signs what is its own, and nothing else
    if not signing:
        raise UsageError("no --key is a log's key", "give what `render-platform vkey` prints")
    blobs, log = open_objects(settings, SystemIds())
    return Evidence(log, blobs, signing, attesting, recovery_key=_recovery_key(settings)), []


def _recovery_key(settings: Settings) -> Verifier | None:
    return Verifier.parse(settings.recovery_key) if settings.recovery_key else None


def _published(evidence: Evidence) -> bytes:
    """The note as it stands before it is verified: what is remembered is no later one. Empty where there is none."""
    try:
        return evidence.log.read(CHECKPOINT)
    except Missing:
        return b""


def _check_witnesses(outcome: Verification, note: bytes, keys: Sequence[WitnessKey], quorum: int | None) -> None:
    """That enough of the pinned witnesses have cosigned the checkpoint."""
    if not keys:
        return
    try:
        found = cosignatures_of(note.decode(), keys)
    except Finding as error:
        outcome.add("log/checkpoint", error.message, None, "that witnesses have seen this log")
        return
    if len(found) < (quorum or len(keys)):
        what = f"{len(found)} of {len(keys)} pinned witnesses have cosigned it; {quorum or len(keys)} must"
        outcome.add("log/checkpoint", what, None, "that everybody is shown the same log")


@click.command()
@click.option("--from", "start", type=Time(), required=True, help="The first hour.")
@click.option("--to", "end", type=Time(), required=True, help="The end of the last hour.")
@click.option("-o", "--output", type=_FILE, required=True, help="The archive to write.")
@click.option("--whole-log", is_flag=True, help="Every entry of the log: proves that no other lane has these hours.")
@state_option
@json_option
def bundle(start: int, end: int, output: Path, whole_log: bool, state: Path | None, as_json: bool) -> None:
    """Write one archive with which an auditor verifies these hours offline. 3: they are not provably complete."""
    with console.progress_bars() as progress, open_platform(load_settings(state_dir=state)) as platform:
        outcome = make_bundle(
            platform.evidence(), platform.log_signer, range(start, end), output, whole_log=whole_log, progress=progress
        )
    _tell_bundle(outcome, as_json)


@click.command("verify-bundle")
@click.argument("file", type=_INPUT)
@_key_option
@click.option("--remember", type=_INPUT, help="A checkpoint that you have kept, which the bundle's log must extend.")
@json_option
def verify_bundle_command(file: Path, vkeys: Sequence[str], remember: Path | None, as_json: bool) -> None:
    """Verify an auditor's bundle with pinned keys alone. 1: it does not verify, 3: it is not provably complete."""
    known = [console.remembered(remember)] if remember else []
    keys = [Verifier.parse(vkey) for vkey in vkeys]
    with console.progress_bars() as progress:
        outcome = verify_bundle(file, keys, remembered=known, progress=progress)
    _tell_bundle(outcome, as_json)


def _tell_bundle(outcome: BundleVerification, as_json: bool) -> None:
    if as_json:
        print_json(outcome.as_json())
    else:
        console.print_bundle(console.person(), outcome)
    sys.exit(outcome.exit_code)


@click.command("collect-orphans")
@click.option("--plan", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--older-than-days", type=click.IntRange(2, 3_650), default=7, help="Their age at least [default: 7].")
@state_option
@json_option
def collect(plan: bool, older_than_days: int, state: Path | None, as_json: bool) -> None:
    """Remove objects that neither the log nor the database names, and that no writer can still be about to name."""
    with open_platform(load_settings(state_dir=state)) as platform:
        platform.log.publish()  # stops where the published log is ahead of this database
        named, age_us = NamedDigests(platform.database), older_than_days * DAY_US
        done = collect_orphans(platform.blobs, named, SystemClock(), plan=plan, older_than_us=age_us)
    if as_json:
        print_json(asdict(done))
    else:
        console.print_collection(done)


@click.command()
@click.argument("event_id", type=click.UUID)
@state_option
def receipt(event_id: uuid.UUID, state: Path | None) -> None:
    """Print an event's receipt: its proof under the published checkpoint, to keep. 3: it is not published yet."""
    with open_platform(load_settings(state_dir=state)) as platform:
        found = Receipts(platform.database, platform.cas, platform.log_objects).of_event(event_id)
    click.echo(found, nl=False)


@click.command("verify-receipt")
@click.argument("file", type=_FILE)
@click.option("--key", "vkeys", multiple=True, required=True, metavar="VKEY", help="A key of the log; repeatable.")
@click.option("--witness", "witnesses", multiple=True, metavar="VKEY", help="A witness's key; repeatable.")
@json_option
def verify_receipt(file: Path, vkeys: Sequence[str], witnesses: Sequence[str], as_json: bool) -> None:
    """Verify a receipt with pinned keys: no state, no network. See also python -m render_platform.receipt_verifier."""
    options = [*(f"--key={key}" for key in vkeys), *(f"--witness={key}" for key in witnesses)]
    sys.exit(receipt_verifier.main([*options, *(["--json"] if as_json else []), "--", str(file)]))


@click.command()
@click.argument("customer_id")
@click.option("--issuer", default="key", help="Whose customer it is: an issuer's alias, or `key` for API keys.")
@state_option
@json_option
def erase(customer_id: str, issuer: str, state: Path | None, as_json: bool) -> None:
    """Make a customer's identity unreadable; every proof stays valid, and receipts given out before still open."""
    with open_platform(load_settings(state_dir=state)) as platform:
        done = Erasure(platform.database, platform.log.append, platform.log.publish).erase(issuer, customer_id)
    if as_json:
        print_json(asdict(done))
    elif done.entry_index is not None:
        click.echo(f"erased; entry {done.entry_index} of the log says so")
    else:
        click.echo("nothing is known of this customer: erased before, or never seen")


@click.command()
@click.option("--plan", is_flag=True, help="Say what would be done, and do nothing.")
@state_option
@json_option
def recover(plan: bool, state: Path | None, as_json: bool) -> None:
    """Replay the published log into a database that is behind it, such as one restored from a backup."""
    with console.progress_bars() as progress, open_platform(load_settings(state_dir=state)) as platform:
        keys = [platform.log_signer.verifier, *_coming(_role_keys(platform), "checkpoint")]
        recovery = Recovery(platform.database, platform.cas, platform.log_objects, keys)
        done = (recovery.plan if plan else recovery.run)(progress)
    if as_json:
        print_json(done.__dict__)
    else:
        console.print_recovery(done, plan)


@click.command("restore-drill")
@click.argument("target", type=_FILE)
@state_option
@json_option
def drill(target: Path, state: Path | None, as_json: bool) -> None:
    """Rebuild database and ClickHouse in a new folder from log and objects alone, and compare with this state."""
    settings = load_settings(state_dir=state)
    with console.progress_bars() as progress:
        with open_platform(settings) as platform:
            published = platform.log.published()
            if published is None:
                raise UsageError("nothing is published yet", "run `render-platform flush` first")
            live = read_figures(platform.database, platform.clickhouse, published.size, progress, frozenset())
            evidence = platform.evidence()
        fast = f"chdb://{target.resolve() / 'clickhouse'}"
        done, rebuilt = restore_drill(
            evidence, target, lambda: open_clickhouse(fast, settings.clickhouse_database), live, progress
        )
    found = differences(live, rebuilt)
    if as_json:
        print_json({"recovered": done.__dict__, "waiting": live.waiting, "differences": found, "equal": not found})
    else:
        console.print_drill(done.size, target, found, live.waiting)
    sys.exit(1 if found else 0)


@click.command("witness")
@click.option("--folder", type=_FILE, required=True, help="Where it remembers what it has cosigned.")
@click.option("--log", "logs", multiple=True, metavar="VKEY", help="A log that it cosigns, by its key; repeatable.")
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="The port; 0 is a free one.")
@click.option("--init", "name", metavar="NAME", help="Make it, under this name, print its key, and end.")
def run_witness(folder: Path, logs: Sequence[str], port: int, name: str | None) -> None:
    """Run a witness: it cosigns only checkpoints that are consistent with all that it has cosigned before."""
    if name:
        click.echo(witness.make_witness(folder, name).vkey)
        return
    if not logs:
        raise UsageError("no --log is given", "give what `render-platform vkey` prints")
    with witness.open_witness(folder, [Verifier.parse(log) for log in logs], SystemClock()) as opened:
        witness.serve(opened, port, lambda url: click.echo(f"witness: {url}   stop: Ctrl-C"))


@click.group()
def rotation() -> None:
    """Put another key in the place of one that signs: draft, sign with the offline recovery key, finish."""


@rotation.command("recovery-key")
@click.argument("file", type=_FILE)
@click.option("--name", required=True, help="Its name, such as example.com/recovery.")
def recovery_key(file: Path, name: str) -> None:
    """Make the recovery key in FILE, which belongs on another machine, and print what to pin."""
    made = load_or_create_key(file, name)
    if made.name != name:
        raise UsageError(f"{file} holds a key of the name {made.name}", "give that name, or another file")
    click.echo(made.verifier.vkey)


@rotation.command("draft")
@click.argument("role", type=click.Choice(keyring.ROLES))
@click.option("--overlap", type=click.IntRange(0, 1_000_000), default=1_000, help="Entries for which both keys hold.")
@state_option
def draft(role: str, overlap: int, state: Path | None) -> None:
    """Make the new key, and print the rotation, signed by the old and the new one."""
    settings = load_settings(state_dir=state)
    recovery = _recovery_key(settings)
    if recovery is None:
        raise UsageError("recovery_key is not set", "set it to what `render-platform rotation recovery-key` printed")
    if getattr(settings, f"{role}_signer"):
        raise UsageError(f"{role}_signer is set", "make the rotation where the key is: docs/spec/keys-and-witness.md")
    with open_platform(settings) as platform:
        keys = _role_keys(platform)
        click.echo(keyring.draft_rotation(role, keys.path(role), recovery, keys.log_size, overlap), nl=False)


@rotation.command("sign")
@click.argument("file", type=_INPUT)
@click.option("--key", type=_FILE, required=True, help="The recovery key's file.")
def sign(file: Path, key: Path) -> None:
    """Sign a draft with the recovery key: on the machine that has it."""
    click.echo(keyring.countersign(_read_rotation(file, draft=True)[0], load_key(key)), nl=False)


@rotation.command("finish")
@click.argument("file", type=_INPUT)
@state_option
@json_option
def finish(file: Path, state: Path | None, as_json: bool) -> None:
    """Log the signed rotation, and put the new key's file in the old one's place."""
    note, signed = _read_rotation(file, draft=False)
    settings = load_settings(state_dir=state)
    with open_platform(settings) as platform:
        platform.log_batches()  # what the old key has attested is logged while it may attest
        keys = _role_keys(platform)
        _check_at_hand(signed, keys, settings)
        index = keyring.log_rotation(
            note, keys.keyring, keys.log_size, platform.cas.put, lambda one: platform.log.append(one, lambda *_: None)
        )
    # A crash before this: the rotation holds, and is not published; the next start puts the files in their places.
    with open_platform(settings) as platform:
        keys = _role_keys(platform)
        keyring.settle_key_files(signed.role, keys.path(signed.role), keys.keyring, keys.log_size)
        platform.log.publish()  # by the new key: without an overlap the old one may not sign this size
    if as_json:
        print_json({"entry_index": index})
    else:
        click.echo(f"rotated; entry {index} of the log says so. Start long-running processes again")


def _read_rotation(file: Path, *, draft: bool) -> tuple[str, keyring.Rotation]:
    """The note in a file, and what it says."""
    with file.open("rb") as opened:
        note = opened.read(keyring.MAX_ROTATION_BYTES + 1).decode(errors="replace")
    try:
        return note, keyring.Rotation.open(note, draft=draft)
    except Finding as error:
        made = "draft` prints" if draft else "sign` prints, made of a draft"
        raise UsageError(f"{file}: {error.message}", f"give what `render-platform rotation {made}") from error


def _check_at_hand(signed: keyring.Rotation, keys: RoleKeys, settings: Settings) -> None:
    """UsageError where the rotation is not from the key in force to one that is here: after it nobody could sign."""
    path, known = keys.path(signed.role), [span.key for span in keys.keyring.spans.get(signed.role, ())]
    if signed.new in known:
        return  # it is logged already
    held = [one.verifier for one in keyring.open_signers(getattr(settings, f"{signed.role}_signer"), path)]
    in_force = known[-1] if known else held[0]
    if signed.old != in_force or signed.new not in (*held, *_coming(keys, signed.role)):
        what = f"the rotation is not from the {signed.role} key in force to a key that is here"
        raise UsageError(what, "make it again, with `render-platform rotation draft` on this state")


def _coming(keys: RoleKeys, role: str) -> list[Verifier]:
    """The key that a draft has made here; a database or keys from before `finish` may not know that it is in force."""
    path = keyring.next_path(keys.path(role))
    return [load_key(path).verifier] if path.exists() else []


def _role_keys(platform: Platform) -> RoleKeys:
    return RoleKeys(platform.settings, platform.database, platform.cas)


COMMANDS: tuple[click.Command, ...] = (verify_command, bundle, verify_bundle_command, receipt, verify_receipt, erase)
COMMANDS += (recover, drill, collect, run_witness, rotation)
