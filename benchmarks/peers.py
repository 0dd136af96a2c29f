"""The gateways that ours is compared with: installed once into a cache folder at pinned versions, started on demand.

Both forward one OpenAI chat completion to the same echo backend, in one process, with no database behind them:
neither keeps a durable bill here. Portkey's gateway listens on every interface; it has no option for another choice.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks import echo
from benchmarks.processes import Server, free_port, run_tool, running

LITELLM_VERSION = "1.106.0"
PORTKEY_VERSION = "1.15.2"
INSTALL_S = 900


class Peer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """What each request needs besides its body."""

    def install(self) -> None:
        """Into the cache folder, unless it is there; Unavailable where that fails."""

    def start(self, folder: Path) -> AbstractContextManager[Server]: ...


@dataclass(frozen=True)
class LiteLLM:
    """LiteLLM's proxy: one worker, a master key, no database, no logging of its own."""

    cache: Path
    backend_url: str
    master_key: str = field(default_factory=lambda: "sk-" + secrets.token_hex(24), repr=False)
    name: str = "LiteLLM proxy"
    version: str = LITELLM_VERSION

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.master_key}"}

    @property
    def _home(self) -> Path:
        return self.cache / f"litellm-{self.version}"

    def install(self) -> None:
        if _is_installed(self._home):
            return
        run_tool([sys.executable, "-m", "venv", str(self._home)], INSTALL_S)
        wanted = f"litellm[proxy]=={self.version}"
        pip = [str(self._home / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
        run_tool([*pip, "--quiet", wanted], INSTALL_S)
        _mark_installed(self._home)

    def start(self, folder: Path) -> AbstractContextManager[Server]:
        port = free_port()
        behind = {"model": f"openai/{echo.MODEL}", "api_base": self.backend_url, "api_key": "none"}
        config = folder / "litellm.yaml"  # JSON is YAML
        config.write_text(json.dumps({"model_list": [{"model_name": echo.MODEL, "litellm_params": behind}]}))
        env = {
            "LITELLM_MASTER_KEY": self.master_key,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
        }
        options = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        program = [str(self._home / "bin" / "litellm"), *options, "--telemetry", "False"]
        return running(self.name, program, port, folder, env)


@dataclass(frozen=True)
class Portkey:
    """Portkey's open-source gateway on Node.js, without its web page."""

    cache: Path
    backend_url: str
    name: str = "Portkey gateway"
    version: str = PORTKEY_VERSION

    @property
    def headers(self) -> Mapping[str, str]:
        return {
            "Authorization": "Bearer none",
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": self.backend_url,
        }

    @property
    def _home(self) -> Path:
        return self.cache / f"portkey-{self.version}"

    def install(self) -> None:
        if _is_installed(self._home):
            return
        self._home.mkdir(parents=True)
        quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
        wanted = f"@portkey-ai/gateway@{self.version}"
        run_tool(["npm", "install", "--prefix", str(self._home), *quiet, wanted], INSTALL_S)
        _mark_installed(self._home)

    def start(self, folder: Path) -> AbstractContextManager[Server]:
        port = free_port()
        script = self._home / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
        env = {"TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost", "NODE_ENV": "production"}
        return running(self.name, ["node", str(script), f"--port={port}", "--headless"], port, folder, env)


def _is_installed(home: Path) -> bool:
    """False also after an installation that was cut short: what it left is removed."""
    if (home / ".installed").is_file():
        return True
    shutil.rmtree(home, ignore_errors=True)
    return False


def _mark_installed(home: Path) -> None:
    (home / ".installed").touch()
