"""A Signer whose key never leaves a key service: copy it, and give it your service's client.

The client here has the form of AWS KMS (key spec ECC_NIST_EDWARDS25519). Put this file on PYTHONPATH and configure

    checkpoint_signer = "python:kms_signer:open_signer"

with KMS_KEY_ID and KMS_KEY_NAME in the environment. The name of a log's key is the log's name: keep it for good.
KMS signs at most 4,096 bytes at once: a checkpoint fits, the attestation of a batch with many devices may not.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from render_platform.errors import Unavailable, UsageError
from render_platform.note import Verifier


class Kms(Protocol):
    """What is needed of a client."""

    def get_public_key(self, *, KeyId: str) -> Any: ...

    def sign(self, *, KeyId: str, Message: bytes, MessageType: str, SigningAlgorithm: str) -> Any: ...


class KmsSigner:
    """Signs under `name` with the key `key_id`; UsageError where that is no Ed25519 key."""

    def __init__(self, client: Kms, key_id: str, name: str) -> None:
        self._client = client
        self._key_id = key_id
        public = load_der_public_key(self._call("get_public_key")["PublicKey"])
        if not isinstance(public, Ed25519PublicKey):
            raise UsageError(f"the key {key_id} is not an Ed25519 key", "make one with spec ECC_NIST_EDWARDS25519")
        self._verifier = Verifier.of(name, public.public_bytes_raw())

    @property
    def name(self) -> str:
        return self._verifier.name

    @property
    def verifier(self) -> Verifier:
        return self._verifier

    def sign(self, data: bytes) -> bytes:
        """A signature that was checked here: a service that answers with anything else never gets it published."""
        answer = self._call("sign", Message=data, MessageType="RAW", SigningAlgorithm="ED25519_SHA_512")
        signature = bytes(answer["Signature"])
        if not self._verifier.verifies(data, signature):
            raise Unavailable("the key service gave a signature that is not its key's", "check the key's id and spec")
        return signature

    def _call(self, method: str, **parameters: Any) -> Any:
        try:
            return getattr(self._client, method)(KeyId=self._key_id, **parameters)
        except OSError as error:  # add your client's own errors; their texts stay out of ours
            raise Unavailable(f"the key service did not answer: {type(error).__name__}", "try again") from None


def open_signer() -> KmsSigner:
    """What the configuration names. Needs boto3, and credentials where boto3 looks for them."""
    import boto3  # type: ignore[import-not-found]

    return KmsSigner(boto3.client("kms"), os.environ["KMS_KEY_ID"], os.environ["KMS_KEY_NAME"])
