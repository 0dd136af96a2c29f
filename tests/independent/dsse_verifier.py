"""Verifies a DSSE envelope with securesystemslib; run in an environment that has it, without this project.

The request on stdin is JSON: the envelope, and the public keys by their key id. Exit codes: 0 verified, with the
payload and the ids of the keys as JSON; 1 not verified.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from securesystemslib.dsse import Envelope  # type: ignore[import-not-found, unused-ignore]
from securesystemslib.exceptions import VerificationError  # type: ignore[import-not-found, unused-ignore]
from securesystemslib.signer import SSlibKey  # type: ignore[import-not-found, unused-ignore]


def main(asked: dict[str, Any]) -> int:
    keys = [SSlibKey(name, "ed25519", "ed25519", {"public": public}) for name, public in asked["keys"].items()]
    envelope = Envelope.from_dict(asked["envelope"])
    try:
        accepted = envelope.verify(keys, threshold=1)
    except VerificationError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"type": envelope.payload_type, "payload": envelope.payload.decode(), "keys": sorted(accepted)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
