// Verifies checkpoints and inclusions with sigstore's own code, the package @sigstore/verify.
//
// The argument is the path of its module `tlog/index.js`; the request on stdin is JSON: the log's name, key id and
// public key, and a list of inclusions. Each is verified alone. Exit codes: 0 all verified; 1 one was refused, which
// is named on stderr; 2 anything else.
"use strict";
const crypto = require("node:crypto");
const fs = require("node:fs");

function bytes(base64) {
  return Buffer.from(base64, "base64");
}

function main() {
  const { verifyTLogInclusion } = require(process.argv[2]);
  const asked = JSON.parse(fs.readFileSync(0, "utf8"));
  const log = {
    baseURL: asked.name,
    logID: bytes(asked.key_id),
    publicKey: crypto.createPublicKey({ key: bytes(asked.public_key), format: "der", type: "spki" }),
    validFor: { start: new Date(0), end: new Date(8.64e15) },
  };
  for (const one of asked.inclusions) {
    const entry = {
      canonicalizedBody: bytes(one.entry),
      inclusionProof: {
        logIndex: String(one.index),
        hashes: one.proof.map(bytes),
        checkpoint: { envelope: one.checkpoint },
      },
    };
    try {
      verifyTLogInclusion(entry, [log]);
    } catch (error) {
      if (error.name !== "VerificationError" && error.code === undefined) throw error;
      process.stderr.write(`entry ${one.index}: ${error.message}\n`);
      process.exit(1);
    }
  }
  process.stdout.write(JSON.stringify({ verified: asked.inclusions.length }) + "\n");
}

try {
  main();
} catch (error) {
  process.stderr.write(`${error.stack}\n`);
  process.exit(2);
}
