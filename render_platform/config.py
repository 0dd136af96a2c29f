"""Configuration: one typed object, made in one place.

Defaults, then the TOML file of RENDER_PLATFORM_CONFIG or --config, then RENDER_PLATFORM_* variables, then options. The
file's tables `backends`, `models` and `issuers` are the gateway's catalogue, and checked there.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import structlog

from render_platform.errors import UsageError

_PREFIX = "RENDER_PLATFORM_"
CATALOGUE_TABLES = ("backends", "models", "issuers")
MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_WITNESSES = 90
"""A signed note holds 100 signatures: these, and ten lines for the log's own keys, of which a rotation adds one."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a platform keeps its state, and its limits. Every field can be set as RENDER_PLATFORM_<FIELD>."""

    state_dir: Path = field(default=Path("state"))
    database_url: str = field(default="", repr=False)  # may hold a password
    """postgresql://user:password@host:port/name. Empty: SQLite, in the state folder."""
    clickhouse_dsn: str = field(default="", repr=False)  # may hold a password
    """Empty: the embedded engine in the state folder."""
    clickhouse_database: str = "render_platform"
    retention_days: int = 0
    """Days of `recorded_at` that ClickHouse keeps; 0 keeps all. Leave it 0 where old traces are replayed."""
    objects_url: str = ""
    """s3://bucket/prefix: where the evidence is kept, in `blobs/` and `log/`. Empty: in the state folder."""
    objects_endpoint: str = ""
    """The S3 server's own address, where it is not AWS's. Credentials come from AWS_* variables."""
    object_lock_days: int = 0
    """Days for which nobody can remove what is written, where the bucket has object lock; 0: no lock of ours."""
    slow_path_engine: str = "duckdb"
    """duckdb | clickhouse: what reads batches for reconciliation and charges; ClickHouse reads them from the bucket."""
    slow_path_cluster: str = ""
    """A cluster that ClickHouse knows, whose nodes share that work. Empty: the server that is asked."""
    slow_path_collection: str = ""
    """A named collection of ClickHouse with its credentials for the bucket. Empty: those that it has by itself."""
    checkpoint_signer: str = ""
    """Who signs, a role: file:<path>, env:<variable> or python:<module>:<function>. Empty: the key in the state folder.

    A list, separated by commas, has the key in force first: see docs/spec/keys-and-witness.md.
    """
    attestation_signer: str = ""
    gateway_signer: str = ""
    recovery_key: str = ""
    """The verifier key of the offline recovery key, which keys are rotated with."""
    witnesses: str = ""
    """`URL VKEY`, separated by commas: who is asked to cosign each checkpoint."""
    witness_quorum: int = 0
    """Cosignatures that a checkpoint needs."""
    witness_policy: str = "publish"
    """publish | hold: what becomes of a checkpoint below the quorum."""
    witness_timeout_s: int = 5
    batch_rows: int = 50_000
    seal_rows_a_transaction: int = 5_000
    fast_path_deadline_s: int = 60
    threshold_ppm: int = 1_000
    """Missing events that a reconciled key may have, a million of its authoritative events: 0.1 %."""
    backlog_rows: int = 5_000
    backlog_age_s: int = 20
    dagster_port: int = 3000
    gateway_host: str = "127.0.0.1"
    """Any other address needs API keys or issuers: without them the gateway listens on loopback only."""
    gateway_port: int = 8080
    meter: str = "auto"
    """auto | nvml | wall_clock: what reads the devices of this machine."""
    max_body_bytes: int = 10 * 1024 * 1024
    rate_per_s: int = 100
    """Requests a second that a customer may make, and `burst` at once, where its own terms say nothing else."""
    burst: int = 1_000
    output_ttl_s: int = 86_400
    drain_s: int = 10
    """How long running jobs may take to end when the gateway is stopped; the next start takes over the rest."""
    gateway_lease_s: int = 30
    """Gateways that share a database: how long after its last sign of life the jobs of one are taken over."""
    report_every_s: int = 30
    """How often the gateway tells Dagster of its jobs."""
    outbox_retention_days: int = 30
    """How long SQL keeps live events that are published, and their jobs; the evidence has them for good."""
    dagster_retention_days: int = 7
    """How long Dagster keeps runs, their events and ticks; what partition status is read from stays."""
    webhook_allow: str = ""
    """host:port, separated by commas, that webhooks may reach although their addresses are not public."""
    alert_webhook: str = field(default="", repr=False)  # the next two and smtp_url are secrets, or hold one
    """The URL that gets alerts as a JSON document."""
    alert_slack: str = field(default="", repr=False)
    """The URL of a Slack-shaped incoming webhook."""
    alert_email: str = ""
    """Who gets alerts by e-mail: addresses, separated by commas."""
    smtp_url: str = field(default="", repr=False)
    """smtp://user:password@host:port, with STARTTLS but to this machine; or smtps://, with TLS at once."""
    alert_from: str = ""
    """The sender of e-mail; empty: its first recipient."""
    alert_repeat_s: int = 3_600
    """How long the same alert is not sent again."""
    dagster_url: str = ""
    """Where people reach the Dagster UI, for links; empty: on this machine, at dagster_port."""
    repair_automatically: int = 0
    """1: hours that are found discrepant are repaired without being asked."""
    price_book: Path = field(default=Path())
    """The file of prices, docs/charges.md. Without one: the sample book of the package."""
    billing_account: str = "render-platform"
    """Who bills, in exports: BillingAccountId."""
    co2_g_per_kwh: int = 0
    """Grams of CO₂ a kilowatt-hour, for what is shown of energy; 0: not shown."""
    catalogue: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The file's tables of backends, models and issuers."""

    def __post_init__(self) -> None:
        bounds = {
            "retention_days": (0, 20_000),
            "object_lock_days": (0, 36_500),
            "witness_quorum": (0, MAX_WITNESSES),
            "witness_timeout_s": (1, 3_600),
            "batch_rows": (1, 50_000),
            "seal_rows_a_transaction": (1, 50_000),
            "fast_path_deadline_s": (0, 86_400),
            "threshold_ppm": (0, 1_000_000),
            "backlog_rows": (1, 10_000_000),
            "backlog_age_s": (1, 86_400),
            "dagster_port": (1, 65_535),
            "gateway_port": (0, 65_535),
            "max_body_bytes": (1_024, 1024 * 1024 * 1024),
            "rate_per_s": (1, 1_000_000),
            "burst": (1, 1_000_000),
            "output_ttl_s": (0, 31_536_000),
            "drain_s": (0, 3_600),
            "gateway_lease_s": (3, 3_600),
            "report_every_s": (1, 3_600),
            "alert_repeat_s": (60, 604_800),
            "repair_automatically": (0, 1),
            "outbox_retention_days": (2, 36_500),
            "dagster_retention_days": (1, 36_500),
            "co2_g_per_kwh": (0, 10_000),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}", f"set it to {low} … {high}")
        if self.database_url and not self.database_url.startswith("postgresql://"):  # not shown: it may be a secret
            raise UsageError("database_url is no PostgreSQL URL", "set it to postgresql://user:password@host:port/name")
        if self.slow_path_engine not in ("duckdb", "clickhouse"):
            raise UsageError(f"slow_path_engine is {self.slow_path_engine!r}", "set it to duckdb or clickhouse")
        if self.witness_policy not in ("publish", "hold"):
            raise UsageError(f"witness_policy is {self.witness_policy!r}", "set it to publish or hold")

    @property
    def database_path(self) -> Path:
        """SQLite's file, where no other database is configured."""
        return self.state_dir / "platform.db"

    @property
    def database(self) -> str:
        """What `open_database` takes: a URL, which may hold a password, or the path of SQLite's file."""
        return self.database_url or str(self.database_path)

    @property
    def has_state(self) -> bool:
        """Whether there is a platform to open. A server's database is one: its tables are made where they lack."""
        return bool(self.database_url) or self.database_path.exists()

    @property
    def keys_dir(self) -> Path:
        return self.state_dir / "keys"

    @property
    def blobs_dir(self) -> Path:
        return self.state_dir / "blobs"

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "log"

    @property
    def dagster_home(self) -> Path:
        return self.state_dir / "dagster"

    @property
    def clickhouse_url(self) -> str:
        return self.clickhouse_dsn or f"chdb://{self.state_dir / 'clickhouse'}"


def load_settings(environ: Mapping[str, str] | None = None, config: Path | None = None, **options: Any) -> Settings:
    """Defaults, overridden by the file, by the environment, and by `options` that are not None.

    Raises UsageError naming a key that is unknown, with the nearest known one, or whose value cannot be read.
    """
    environ = os.environ if environ is None else environ
    known = {f.name: f for f in fields(Settings) if f.name != "catalogue"}
    file = config or (Path(text) if (text := environ.get(f"{_PREFIX}CONFIG")) else None)
    values = {} if file is None else _read_file(file, {name: f.type for name, f in known.items()})
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or variable == f"{_PREFIX}CONFIG":
            continue
        name = variable.removeprefix(_PREFIX).lower()
        if name not in known:
            raise UsageError(f"{variable} is not a setting", nearest(name, known))
        values[name] = _parse(variable, text, known[name].type)
    values.update({name: value for name, value in options.items() if value is not None})
    settings = Settings(**values)
    try:
        return replace(settings, state_dir=settings.state_dir.expanduser().resolve())
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"state_dir {settings.state_dir} is not a path: {error}", "give --state a folder") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown key: the known one that is most like it, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, 0.6)
    return f"did you mean {close[0]}?" if close else f"settings are {', '.join(names)}"


def _read_file(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """A TOML file's settings, and its tables as `catalogue`; a relative state_dir is the file's own folder's."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        found = tomllib.loads(data.decode() if len(data) <= MAX_FILE_BYTES else "")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give a configuration file that can be read") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number too long, nested too deeply
        raise UsageError(f"{path} is not TOML: {error}", "see docs/configuration.md for an example") from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} has more than {MAX_FILE_BYTES} bytes", "give a configuration file")
    values: dict[str, Any] = {"catalogue": {name: found.pop(name) for name in CATALOGUE_TABLES if name in found}}
    for name, value in found.items():
        if name not in known:
            raise UsageError(f"{path}: {name} is not a setting", nearest(name, [*known, *CATALOGUE_TABLES]))
        if type(value) is not (int if known[name] == "int" else str):
            kind = "a whole number" if known[name] == "int" else "text"
            raise UsageError(f"{path}: {name} is {value!r}", f"set it to {kind}")
        values[name] = path.parent / str(value) if known[name] == "Path" else value
    return values


def configure_logs() -> None:
    """Structured logs, one JSON object a line, to stderr: what a command prints stays for its reader."""
    driver = logging.getLogger("clickhouse_connect")  # says on stderr what its errors say again
    driver.addHandler(logging.NullHandler())
    driver.propagate = False
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _parse(variable: str, text: str, kind: Any) -> Any:
    if kind == "Path":
        return Path(text)
    if kind != "int":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{variable} is {text!r}", "set it to a whole number") from None
