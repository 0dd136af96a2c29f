"""The gateway's commands: serve, status, and the keys of its callers. What they need is imported when they run."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from render_platform.clock import SystemClock, SystemIds, iso
from render_platform.config import Settings, load_settings
from render_platform.database import Database, open_database
from render_platform.errors import UsageError
from render_platform.options import json_option, print_json, state_option

if TYPE_CHECKING:
    from render_platform.gateway.identity import ApiKey, ApiKeys

config_option = click.option(
    "--config", type=click.Path(path_type=Path), help="A TOML file of settings, backends, models and issuers."
)


@click.command()
@state_option
@config_option
@click.option("--host", help="The address to listen on [default: 127.0.0.1].")
@click.option("--port", type=click.IntRange(0, 65_535), help="The port; 0 is a free one [default: 8080].")
def serve(state: Path | None, config: Path | None, host: str | None, port: int | None) -> None:
    """Start the gateway: accept, queue, forward, meter and bill jobs. Without a file: two simulated devices."""
    settings = load_settings(config=config, state_dir=state, gateway_host=host, gateway_port=port)
    sys.exit(run_gateway(settings))


def run_gateway(settings: Settings) -> int:
    """Serve until a signal; the exit code."""
    import uvloop

    # The loop and the threads of the fast path take turns at the interpreter: none may wait 5 ms for another.
    sys.setswitchinterval(0.0002)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve(settings))
    gc.unfreeze()  # what was put by is let go of in order
    return code


async def _serve(settings: Settings) -> int:
    from render_platform.gateway.app import serve as serve_app
    from render_platform.gateway.service import Gateway

    gateway = Gateway(settings, apart=True)

    def ready(url: str) -> None:
        gc.freeze()  # what stands now stays: it need not be looked at again
        gc.set_threshold(20_000, 20, 50)
        click.echo(f"gateway {gateway.gateway_id}, epoch {gateway.epoch}: {url}   API: {url}/schema   stop: Ctrl-C")
        click.echo(f"meter: {gateway.meter.describe()}")
        for server in gateway.fleet.servers.values():
            spec = server.spec
            click.echo(f"backend {spec.name}: {spec.kind}, {spec.capacity} at once, device {server.device.name}")
        if gateway.anonymous:
            click.echo("no API keys and no issuers: open to this machine only; see `render-platform key create`")

    return await serve_app(gateway, ready)


@click.command()
@state_option
@json_option
def status(state: Path | None, as_json: bool) -> None:
    """What the gateway accepted, and how far its events have come. No gateway needs to run."""
    settings = load_settings(state_dir=state)
    database = _database(settings)
    try:
        counts = _counts(database)
    finally:
        database.close()
    if as_json:
        print_json(counts)
    else:
        for name, value in counts.items():
            click.echo(f"{name:18} {'unknown' if value is None else value}")


def _counts(database: Database) -> dict[str, Any]:
    from render_platform.gateway.archive import counts, fast_path_dropped
    from render_platform.outbox import Outbox

    outbox = Outbox(database, SystemIds())
    events = {"events": outbox.totals().events}
    return {**counts(database), **events, **outbox.progress(), "fast_path_dropped": fast_path_dropped(database)}


def _database(settings: Settings) -> Database:
    if not settings.has_state:
        raise UsageError(
            f"{settings.state_dir} holds no platform state", "run `render-platform serve`, or give --state DIR"
        )
    return open_database(settings.database)


@click.group()
def key() -> None:
    """API keys of the gateway's callers. Only their hashes are kept."""


@key.command("create")
@click.argument("customer")
@click.option("--role", "roles", multiple=True, default=("customer",), help="customer, meter, auditor or operator.")
@click.option("--source", "sources", multiple=True, help="For a meter: a CloudEvents source that it may report from.")
@click.option(
    "--customer", "customers", multiple=True, help="For a meter: a customer that it may report about; * is any."
)
@click.option("--tier", default="standard", show_default=True, help="The pricing tier.")
@click.option("--priority", default="normal", show_default=True, help="The highest lane that it may use.")
@click.option("--rate", type=int, help="Requests a second [default: the gateway's].")
@click.option("--burst", type=int, help="Requests at once [default: the gateway's].")
@state_option
def create_key(
    customer: str,
    roles: Sequence[str],
    sources: Sequence[str],
    customers: Sequence[str],
    tier: str,
    priority: str,
    rate: int | None,
    burst: int | None,
    state: Path | None,
) -> None:
    """Make a key for CUSTOMER, or whoever holds it in another role, and print it: it is shown this once."""
    from render_platform.gateway.identity import Terms

    with _keys(state) as keys:
        first = not keys.list()
        made = keys.create(customer, roles, Terms(tier, priority, rate, burst), sources=sources, customers=customers)
    click.echo(made)
    if first:
        click.echo("a gateway that began without keys stays open until it is started again", err=True)


@key.command("revoke")
@click.argument("key_id")
@state_option
def revoke_key(key_id: str, state: Path | None) -> None:
    """Refuse a key from now on: within five seconds where a gateway runs."""
    with _keys(state) as keys:
        keys.revoke(key_id)
    click.echo(f"{key_id} is revoked")


@key.command("list")
@state_option
@json_option
def list_keys(state: Path | None, as_json: bool) -> None:
    """Every key by its id; the keys themselves are nowhere."""
    with _keys(state) as keys:
        found = keys.list()
    if as_json:
        print_json([_key_row(one) for one in found])
        return
    click.echo("\t".join(_KEY_COLUMNS))
    for one in found:
        click.echo("\t".join("-" if value is None else str(value) for value in _key_row(one).values()))


@contextmanager
def _keys(state: Path | None) -> Iterator[ApiKeys]:
    """The state folder's keys; a folder without a database gets one, because keys come before the first start."""
    from render_platform.gateway.identity import ApiKeys

    settings = load_settings(state_dir=state)
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = open_database(settings.database)
    try:
        yield ApiKeys(database, SystemClock(), SystemIds())
    finally:
        database.close()


_KEY_COLUMNS = ("key_id", "customer", "roles", "tier", "priority", "created", "revoked")


def _key_row(one: ApiKey) -> dict[str, Any]:
    principal = one.principal
    roles = ",".join(sorted(principal.roles))
    terms = (principal.pricing_tier, principal.priority_max)
    times = (iso(one.created_us), iso(one.revoked_us) if one.revoked_us is not None else None)
    return dict(zip(_KEY_COLUMNS, (one.key_id, principal.customer_id, roles, *terms, *times), strict=True))
