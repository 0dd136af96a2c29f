"""The catalogue: backends, models, aliases, issuers and keys of one configuration file, checked as a whole.

    [backends.triton-a]                       [models.flux-dev]
    kind = "triton"                           family = "flux"
    url = "http://127.0.0.1:8000"             modality = "image"
    capacity = 4                              type = "rectified_flow"
    device = "GPU-…"                          tasks = ["text2image"]
                                              aliases = ["black-forest-labs/FLUX.1-dev"]
                                              backends = { triton-a = "flux_dev" }

Every name in it is checked, an unknown key is an error that names the nearest one, and nothing is half-accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from render_platform.config import CATALOGUE_TABLES, nearest
from render_platform.errors import UsageError
from render_platform.events import MAX_GPU_TIME_NS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")

OPENAI_TASKS = {"chat": "chat/completions", "completion": "completions", "embedding": "embeddings"}
"""Tasks that OpenAI-compatible servers know, and their paths below /v1."""


class BackendSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One inference server. `capacity` is how many jobs it runs at once."""

    kind: Literal["triton", "openai", "simulated"]
    name: str = ""
    url: str = ""
    capacity: int = 4
    parallel: int = 0
    """How many of them its device works on at once (a server's instances × batch); 0: all that it runs."""
    device: str = ""
    """The GPU's UUID, as NVML shows it; empty: the backend's name, marked as no device that was read."""
    gpu_count: int = 1
    timeout_s: int = 600
    api_key_env: str = ""
    """The variable that holds the server's key: the key itself never stands in a file."""
    spans_port: int = 0
    """Triton: the loopback port on which its OpenTelemetry spans are received; 0: its statistics are read instead."""
    speed: float = 1.0
    """Simulated: how many times faster than its declared costs."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model. `backends` maps a backend to the model's name there."""

    family: str
    modality: str
    type: Literal["llm", "rectified_flow", "other"]
    tasks: list[str]
    backends: dict[str, str]
    name: str = ""
    aliases: list[str] = []
    formats: list[str] = []
    inputs: dict[str, str] = {}
    """Triton: field of the request → datatype of the input tensor of that name, such as BYTES or INT32."""
    max_queue: int = 10_000
    max_attempts: int = 3
    ttl_s: int = 3_600


class IssuerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose JWTs are accepted."""

    issuer: str
    audience: str
    jwks_file: str
    claim: Literal["sub", "customer_id", "user_id"] = "sub"


class Catalogue(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    backends: dict[str, BackendSpec]
    models: dict[str, ModelSpec]
    issuers: dict[str, IssuerSpec] = {}

    def resolve(self, name: str) -> ModelSpec | None:
        """The model of a name or an alias, such as a Hugging Face id."""
        return self.models.get(name) or self.models.get(self.aliases().get(name, ""))

    def aliases(self) -> dict[str, str]:
        return {alias: name for name, model in self.models.items() for alias in model.aliases}


def make_catalogue(tables: Mapping[str, Any]) -> Catalogue:
    """The catalogue of a file's tables; without backends and models, the simulated ones.

    UsageError names the field, and the nearest key where one is unknown.
    """
    found = {section: tables[section] for section in CATALOGUE_TABLES if section in tables}
    if not {"backends", "models"} & found.keys():
        found |= SIMULATED
    for section, kind in (("backends", BackendSpec), ("models", ModelSpec), ("issuers", IssuerSpec)):
        _check_keys(section, found.get(section, {}), kind)
    try:
        catalogue = msgspec.convert({"backends": {}, "models": {}, **found}, Catalogue)
    except msgspec.ValidationError as error:
        raise UsageError(f"the catalogue is not valid: {error}", "see docs/configuration.md") from error
    named = Catalogue(
        backends={name: msgspec.structs.replace(spec, name=name) for name, spec in catalogue.backends.items()},
        models={name: msgspec.structs.replace(spec, name=name) for name, spec in catalogue.models.items()},
        issuers=catalogue.issuers,
    )
    _check(named)
    return named


def _check_keys(section: str, tables: Any, kind: type[msgspec.Struct]) -> None:
    if not isinstance(tables, Mapping):
        raise UsageError(f"{section} is not a table of tables", f"write [{section}.<name>]")
    fields = set(kind.__struct_fields__) - {"name"}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise UsageError(f"{section}.{name} is not a table", f"write [{section}.{name}]")
        for key in table:
            if key not in fields:
                raise UsageError(f"{section}.{name}.{key} is not a setting", nearest(key, fields))


def _check(catalogue: Catalogue) -> None:
    for name, backend in catalogue.backends.items():
        _check_backend(f"backends.{name}", name, backend)
    taken: dict[str, str] = {}
    for name, model in catalogue.models.items():
        _check_model(f"models.{name}", name, model, catalogue.backends)
        for alias in (name, *model.aliases):
            _require(ALIAS.fullmatch(alias), f"models.{name}.aliases", f"{alias!r} is not a name")
            if taken.setdefault(alias, name) != name:
                raise UsageError(f"{alias} names both {taken[alias]} and {name}", "give each model aliases of its own")
    for name in catalogue.issuers:
        _require(re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name), f"issuers.{name}", "is not a short lower-case name")
        _require(name not in ("key", "trace", "anonymous"), f"issuers.{name}", "is reserved")


def _check_backend(where: str, name: str, backend: BackendSpec) -> None:
    _require(NAME.fullmatch(name), where, "is not a name of letters, digits and ._-")
    _require(1 <= backend.capacity <= 10_000, f"{where}.capacity", "must be 1 … 10000")
    _require(0 <= backend.parallel <= 10_000, f"{where}.parallel", "must be 0 … 10000")
    _require(1 <= backend.gpu_count <= 1_024, f"{where}.gpu_count", "must be 1 … 1024")
    _require(1 <= backend.timeout_s <= 86_400, f"{where}.timeout_s", "must be 1 … 86400")
    most = MAX_GPU_TIME_NS // 10**9
    _require(backend.gpu_count * backend.timeout_s <= most, f"{where}.timeout_s", f"× gpu_count must be at most {most}")
    _require(0 <= backend.spans_port <= 65_535, f"{where}.spans_port", "must be 0 … 65535")
    _require(backend.speed > 0, f"{where}.speed", "must be above 0")
    _require(not backend.device or ALIAS.fullmatch(backend.device), f"{where}.device", "is not a device's name")
    if backend.kind != "simulated":
        good = re.fullmatch(r"https?://[^/@?#\s]+(/[^?#\s]*)?", backend.url)
        _require(good, f"{where}.url", "must be http(s)://host:port, without a password in it")


def _check_model(where: str, name: str, model: ModelSpec, backends: Mapping[str, BackendSpec]) -> None:
    for label, text in (("", name), (".family", model.family), (".modality", model.modality)):
        _require(NAME.fullmatch(text), where + label, f"{text!r} is not a name of letters, digits and ._-")
    for task in model.tasks:
        _require(NAME.fullmatch(task), f"{where}.tasks", f"{task!r} is not a name of letters, digits and ._-")
    _require(model.tasks and model.backends, where, "needs at least one of tasks and of backends")
    _require(1 <= model.max_queue <= 1_000_000, f"{where}.max_queue", "must be 1 … 1000000")
    _require(1 <= model.max_attempts <= 20, f"{where}.max_attempts", "must be 1 … 20")
    _require(1 <= model.ttl_s <= 604_800, f"{where}.ttl_s", "must be 1 … 604800")
    for backend in model.backends:
        if backend not in backends:
            raise UsageError(f"{where}.backends names {backend}, which is not there", nearest(backend, backends))


def _require(good: object, where: str, what: str) -> None:
    if not good:
        raise UsageError(f"{where} {what}", "see docs/configuration.md")


SIMULATED: dict[str, Any] = {
    "backends": {
        "simulated-0": {"kind": "simulated", "capacity": 16, "device": "GPU-sim-00"},
        "simulated-1": {"kind": "simulated", "capacity": 16, "device": "GPU-sim-01"},
    },
    "models": {
        "llama-8b": {
            "family": "llama",
            "modality": "text",
            "type": "llm",
            "tasks": ["chat", "completion", "embedding"],
            "aliases": ["meta-llama/Llama-3.1-8B-Instruct"],
            "backends": {"simulated-0": "llama-8b", "simulated-1": "llama-8b"},
        },
        "flux-dev": {
            "family": "flux",
            "modality": "image",
            "type": "rectified_flow",
            "tasks": ["text2image"],
            "aliases": ["black-forest-labs/FLUX.1-dev"],
            "formats": ["png", "jpeg"],
            "backends": {"simulated-0": "flux-dev", "simulated-1": "flux-dev"},
        },
    },
}
"""What runs without a configuration file: two simulated devices, and two models on both."""
