// Verifies a receipt with what a browser has, SHA-256 and Ed25519: docs/spec/receipt.md. What it says holds of the text
// that it was given; that the text is in its one form is for `render-platform verify-receipt` to check.

const utf8 = new TextEncoder();
const CUSTOMER = utf8.encode("render-platform/customer/v1\n");
const LOG_KEY = 1;
const FIELDS = "version,entry,event,event_index,event_proof,opening,erasure";

function must(good, what) {
  if (!good) throw new Error(what);
}

function bytesOf(base64, what) {
  try {
    const found = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
    if (btoa(String.fromCharCode(...found)) === base64) return found;
  } catch { /* none */ }
  throw new Error(`${what} is not base64`);
}

// A receipt's extra line may be long: spreading it into fromCharCode would be too many arguments.
function textOf(base64) {
  const found = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  return new TextDecoder("utf-8", { fatal: true }).decode(found);
}

const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

function unhex(text, what) {
  must(typeof text === "string" && /^[0-9a-f]{64}$/.test(text), `${what} is not 64 hexadecimal digits`);
  return Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));
}

async function sha256(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { whole.set(part, at); at += part.length; }
  return new Uint8Array(await crypto.subtle.digest("SHA-256", whole));
}

// RFC 9162, 2.1.3.2: `text` is leaf `index` of the tree of `size` with this root.
async function prove(text, index, size, proof, root, what) {
  must(index >= 0n && index < size, `${what}: its index is not one of the tree`);
  let found = await sha256(Uint8Array.of(0), utf8.encode(text));
  let first = index, last = size - 1n;
  for (const node of proof) {
    must(last !== 0n, `${what}: the proof is too long`);
    if (first & 1n || first === last) {
      found = await sha256(Uint8Array.of(1), node, found);
      while (first && !(first & 1n)) { first >>= 1n; last >>= 1n; }
    } else {
      found = await sha256(Uint8Array.of(1), found, node);
    }
    first >>= 1n; last >>= 1n;
  }
  must(last === 0n && hex(found) === hex(root), `${what} does not hash to the root`);
}

function parseReceipt(text) {
  const [head, note] = [text.slice(0, text.indexOf("\n\n")), text.slice(text.indexOf("\n\n") + 2)];
  const [header, extraLine, indexLine, ...proof] = head.split("\n");
  must(header === "c2sp.org/tlog-proof@v1" && extraLine?.startsWith("extra ") && indexLine?.startsWith("index "), "it is no receipt");
  const [origin, size, root, blank, ...signatures] = note.split("\n").slice(0, -1);
  must(origin && blank === "" && /^\d{1,18}$/.test(size) && /^\d{1,18}$/.test(indexLine.slice(6)), "its checkpoint is malformed");
  const said = textOf(extraLine.slice(6)), extra = JSON.parse(said);
  must(extra.version === 1 && Object.keys(extra).join() === FIELDS, "it is no receipt of version 1");
  must(JSON.stringify(extra) === said, "its extra line is not in its one form"); // a name that stands twice, too
  return { extra, index: BigInt(indexLine.slice(6)), proof: proof.map((line) => bytesOf(line, "a line of the proof")),
    origin, size: BigInt(size), root: bytesOf(root, "the root"), signed: `${origin}\n${size}\n${root}\n`, signatures };
}

// The key that signed. A signature of a given key that is wrong ends it all.
async function signedBy(receipt, vkeys) {
  for (const vkey of vkeys) {
    const [name, id, ...rest] = vkey.split("+");
    const data = bytesOf(rest.join("+"), "the key");
    must(data.length === 33 && data[0] === LOG_KEY, "the key is no log key: <name>+<key id>+<base64>");
    const named = await sha256(utf8.encode(`${name}\n`), data);
    must(hex(named.slice(0, 4)) === id, "the key does not have the id that it names");
    for (const line of receipt.signatures) {
      const [dash, signer, encoded] = line.split(" ");
      const signature = bytesOf(encoded ?? "", "a signature");
      if (dash !== "—" || signer !== name || name !== receipt.origin || hex(signature.slice(0, 4)) !== id) continue;
      const usable = await crypto.subtle.importKey("raw", data.slice(1), { name: "Ed25519" }, false, ["verify"]);
      const good = await crypto.subtle.verify({ name: "Ed25519" }, usable, signature.slice(4), utf8.encode(receipt.signed));
      must(good, "the signature of the checkpoint is wrong");
      return vkey;
    }
  }
  throw new Error("no given key has signed the checkpoint");
}

// What `text` proves of the job, sentence by sentence, and whether one of the log keys `vkeys` signed it; an Error where it
// does not. `signed` is false where there is no key, or the browser has no Ed25519.
export async function verifyReceipt(text, vkeys, jobId) {
  const receipt = parseReceipt(text), { extra } = receipt;
  const event = JSON.parse(extra.event), entry = JSON.parse(extra.entry);
  must(event.job_id === jobId, "it is the receipt of another job");
  must(entry.type === "usage_batch" && Number.isSafeInteger(entry.records), "its entry is not that of a batch");
  const nodes = extra.event_proof.map((node) => unhex(node, "a node of the proof"));
  await prove(extra.event, BigInt(extra.event_index), BigInt(entry.records), nodes, unhex(entry.merkle_root, "the root"), "the event");
  const said = [`The usage event ${event.event_id} is number ${extra.event_index + 1} of ${entry.records} in batch ${entry.batch_id}: it hashes to the batch's root.`];
  await prove(extra.entry, receipt.index, receipt.size, receipt.proof, receipt.root, "the entry");
  said.push(`The batch's entry is number ${receipt.index} of ${receipt.size} in the log ${receipt.origin}: it hashes to the checkpoint's root.`);
  if (extra.opening) {
    const opened = await sha256(CUSTOMER, unhex(extra.opening.salt, "the salt"), utf8.encode(extra.opening.customer_id));
    must(hex(opened) === event.customer_ref, "its opening is not that of the event's customer");
    said.push("The customer's name in it opens the event's reference.");
  }
  if (!vkeys.length) return { said, signed: false };
  try {
    said.push(`The checkpoint is signed by ${await signedBy(receipt, vkeys)}.`);
  } catch (error) {
    if (error.name !== "NotSupportedError") throw error;
    return { said, signed: false };
  }
  return { said, signed: true };
}
