// The page at `/`. It shows /overview and /overview/jobs/{id}, and verifies receipts with this browser's own SHA-256
// and Ed25519. Text goes into the page as text, never as HTML. A key stays in `key`, and leaves as a header only.

import { verifyReceipt } from "./receipt.js";

const EVERY_MS = 2000, TIMEOUT_MS = 5000, RATE_MS = 10000;
const $ = (id) => document.getElementById(id);
const say = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };

let key = "";
let timer = 0, looking = false;
let followed = "", path = null; // the job that is followed, and its path as it was last read
let seen = new Map(); // stages that this page saw happen: name -> ms, or 0 where it was done when we came
let samples = []; // [ms, accepted, finished], for the rates
let lastGood = 0;

// Asking.

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(url) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const reply = await fetch(url, { headers, cache: "no-store", credentials: "omit", redirect: "error",
    signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (reply.ok) return reply;
  let detail = "";
  try { detail = (await reply.json()).detail ?? ""; } catch { /* no problem document */ }
  throw new Refused(reply.status, String(detail));
}

async function look() {
  if (looking) return;
  looking = true;
  clearTimeout(timer);
  try {
    const overview = await (await ask("/overview")).json();
    showOverview(overview);
    if (!followed && overview.last_job) follow(overview.last_job);
    if (followed && !isComplete(path)) await lookAtJob();
    lastGood = Date.now();
    $("key-section").hidden = true;
    tell("");
  } catch (error) {
    onFailure(error);
  } finally {
    looking = false;
    if (!document.hidden && $("key-section").hidden) timer = setTimeout(look, EVERY_MS);
  }
}

async function lookAtJob() {
  const asked = followed;
  try {
    const found = await (await ask(`/overview/jobs/${asked}`)).json();
    if (asked === followed) showJob(found);
  } catch (error) {
    if (!(error instanceof Refused) || error.status !== 404) throw error;
    followed = ""; // it is gone, or another's: the next look takes the newest
  }
}

function isComplete(job) {
  return job !== null && job.receipt !== null && job.stages.every((stage) => !["waiting", "unknown"].includes(stage.state));
}

function onFailure(error) {
  if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
    $("key-section").hidden = false;
    document.body.classList.toggle("stale", lastGood > 0);
    tell(key ? `That key does not open this page: ${error.message || error.status}.` : "");
    if (document.activeElement === document.body) $("key-input").focus();
    return;
  }
  const why = error instanceof Refused ? `answers ${error.status}: ${error.message}` : "does not answer";
  const since = lastGood ? ` What stands here is of ${clock(lastGood)}.` : "";
  tell(`The gateway ${why}.${since}`);
}

function tell(text) {
  $("banner").hidden = !text;
  say("banner", text);
  document.body.classList.toggle("stale", text !== "" && lastGood > 0);
}

// Showing.

const number = (value) => value.toLocaleString("en");
const clock = (ms) => new Date(ms).toLocaleTimeString(undefined, { hour12: false });
const dateTime = (ms) => new Date(ms).toLocaleString(undefined, { hour12: false });

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showOverview(overview) {
  say("gateway", `Gateway ${overview.gateway}, start ${overview.epoch}, since ${dateTime(overview.since_us / 1000)}. ` +
    `Read at ${clock(overview.at_us / 1000)}.`);
  for (const id of ["now", "verdicts", "backlog"]) $(id).hidden = !overview.sees_all;
  $("job-section").hidden = false;
  document.querySelector("nav").hidden = !overview.dagster;
  if (!overview.sees_all) return;
  for (const place of document.querySelectorAll("[data-count]")) showCount(place, overview);
  showRates(overview);
  const ended = Object.entries(overview.jobs.ended).sort().map(([status, count]) => `${number(count)} ${status}`);
  say("ended", `Ended since this gateway started: ${ended.join(", ") || "none"}.`);
  const error = overview.fast_path.last_error;
  say("fast-error", error ? `The last error of the fast path: ${error}` : "");
  showVerdicts(overview.verdicts);
  showRows("queue", overview.queue.map((one) => [one.model, ...["high", "normal", "low"].map((lane) => one.waiting[lane]),
    one.running, one.capacity]));
  const health = { closed: "healthy", half_open: "being tried again", open: "failing: left alone for now" };
  showRows("backends", overview.backends.map((one) => [one.name, health[one.breaker] ?? one.breaker, one.running, one.slots]));
  showLinks(overview.dagster);
}

function showCount(place, overview) {
  const [group, name] = place.dataset.count.split(".");
  const value = overview[group]?.[name];
  const known = typeof value === "number";
  const more = name === "outbox" && overview.events.outbox_capped ? "+" : "";
  place.dataset.value = known ? String(value) : "";
  place.classList.toggle("unknown", !known);
  place.textContent = known ? number(value) + more : "unknown";
}

function showRates(overview) {
  const now = overview.at_us / 1000;
  samples = samples.filter(([at]) => at < now && now - at <= RATE_MS);
  const first = samples[0];
  samples.push([now, overview.jobs.accepted, overview.jobs.finished]);
  ["rate-accepted", "rate-finished"].forEach((id, at) => {
    if (!first) return say(id, "rate not known yet");
    const seconds = (now - first[0]) / 1000;
    say(id, `${((samples.at(-1)[at + 1] - first[at + 1]) / seconds).toFixed(1)} a second, the last ${Math.round(seconds)} s`);
  });
}

function showVerdicts(verdicts) {
  const place = $("verdict-last-hour"), last = verdicts.last;
  place.replaceChildren();
  if (!last) {
    place.textContent = "No hour has a verdict yet: an hour is reconciled when all of it is published, some minutes after its end.";
  } else {
    const good = last.status === "reconciled" && !last.out_of_date;
    const text = last.out_of_date ? `${last.status}, out of date` : last.status;
    place.append(`The hour of ${dateTime(Date.parse(last.hour))}: `, element("strong", text, good ? "good" : "bad"),
      `, revision ${last.revision}, report `, digest(last.digest));
  }
  const hours = Object.entries(verdicts.hours).sort().map(([status, count]) => `${number(count)} ${status}`);
  say("verdict-hours", hours.length ? `Hours by their last report: ${hours.join(", ")}.` : "");
}

function showRows(id, rows) {
  $(id).replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    cells.forEach((cell, at) => {
      const made = element(at ? "td" : "th", typeof cell === "number" ? number(cell) : String(cell ?? "unknown"));
      if (!at) made.scope = "row";
      row.append(made);
    });
    return row;
  }));
}

function showLinks(dagster) {
  if (!/^https?:\/\//.test(dagster ?? "")) return;
  for (const link of document.querySelectorAll("a[data-path]")) link.href = dagster.replace(/\/$/, "") + link.dataset.path;
}

function digest(text) {
  const made = element("code", `${text.slice(0, 16)}…`);
  made.title = text;
  return made;
}

// The job.

function follow(jobId) {
  followed = jobId;
  path = null;
  seen = new Map();
  $("receipt-verdict").replaceChildren();
}

function showJob(job) {
  path = job;
  $("no-job").hidden = true;
  $("job").hidden = false;
  say("last-job", job.job_id);
  const used = job.gpu_seconds === null ? "" : `, ${job.gpu_seconds} GPU seconds`;
  say("job-facts", `${job.model}, ${job.status}${used}, customer ${job.customer}`);
  for (const stage of job.stages) showStage(stage);
  $("receipt").hidden = job.receipt === null;
  if (job.receipt !== null) {
    $("receipt-link").href = job.receipt;
    if (!$("log-key").value && job.log_keys.length) $("log-key").value = job.log_keys.join(" ");
  }
}

function showStage(stage) {
  const place = document.querySelector(`[data-stage="${stage.name}"]`);
  if (!place) return;
  if (!seen.has(stage.name) && stage.state === "done") seen.set(stage.name, 0);
  else if (stage.state !== "done") seen.set(stage.name, null);
  else if (seen.get(stage.name) === null) seen.set(stage.name, Date.now());
  place.dataset.state = stage.state;
  let state = place.querySelector(".state");
  if (!state) {
    state = element("span", "", "state");
    state.dataset.testid = "stage-state";
    place.prepend(state);
  }
  state.textContent = stage.state;
  const facts = element("div", undefined, "facts");
  const at = whenOf(stage);
  if (at) facts.append(element("p", at));
  if (stage.id) facts.append(labelled("", element("code", stage.id)));
  if (stage.digest) facts.append(labelled("", digest(stage.digest)));
  if (stage.detail) facts.append(element("p", stage.detail));
  place.querySelector(".facts")?.remove();
  place.append(facts);
}

function labelled(text, inner) {
  const made = element("p", text);
  made.append(inner);
  return made;
}

function whenOf(stage) {
  if (stage.state !== "done") return "";
  if (stage.at_us !== null) {
    const ms = Math.floor(stage.at_us / 1000);
    const today = new Date(ms).toDateString() === new Date().toDateString();
    return `${today ? clock(ms) : dateTime(ms)}.${String(ms % 1000).padStart(3, "0")}`;
  }
  const at = seen.get(stage.name);
  return at ? `seen at ${clock(at)}` : "";
}

// The receipt.

async function onVerify() {
  const button = $("receipt-verify"), place = $("receipt-verdict"), job = path;
  button.disabled = true;
  place.replaceChildren(element("p", "Verifying…", "quiet"));
  const command = `render-platform verify-receipt FILE --key '${$("log-key").value.trim() || "VKEY"}'`;
  try {
    if (!globalThis.crypto?.subtle) throw new Refused(0, "This browser hashes for pages of https and of this machine only.");
    const text = await (await ask(job.receipt)).text();
    const { said, signed } = await verifyReceipt(text, $("log-key").value.split(/\s+/).filter(Boolean), job.job_id);
    const list = element("ul");
    list.append(...said.map((line) => element("li", line)));
    const whose = $("log-key").value === job.log_keys.join(" ") ? "as this gateway names it" : "that you gave";
    const verdict = signed ? element("p", `Verified in this browser, with the log's key ${whose}.`, "good")
      : element("p", "The hashes are verified in this browser; the signature is not: there is no key for it here, or this browser has no Ed25519.", "wait");
    place.replaceChildren(verdict, list);
  } catch (error) {
    const asked = error instanceof Refused || error instanceof TypeError || error.name === "TimeoutError";
    place.replaceChildren(asked ? element("p", `Not verified here: ${error.message}`, "wait") : element("p", `Not proven: ${error.message}.`, "bad"));
  } finally {
    place.append(labelled("Without this page, with a key that you pinned yourself: ", element("code", command)));
    button.disabled = false;
  }
}

// With a key the link cannot open the route by itself: the receipt is fetched, and handed over as a file.
async function onOpen(click) {
  if (!key) return;
  click.preventDefault();
  try {
    const file = URL.createObjectURL(new Blob([await (await ask(path.receipt)).arrayBuffer()], { type: "text/plain" }));
    const link = element("a");
    link.href = file;
    link.download = `receipt-${path.job_id}.txt`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(file), 60000);
  } catch (error) {
    tell(`The receipt could not be read: ${error.message}`);
  }
}

// Beginning.

$("key-form").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  key = $("key-input").value.trim();
  $("key-input").value = "";
  follow(""); // another caller's, perhaps: nothing of the one before stays
  samples = [];
  $("job").hidden = true;
  $("no-job").hidden = false;
  look();
});
$("follow-newest").addEventListener("click", () => { follow(""); look(); });
$("receipt-verify").addEventListener("click", onVerify);
$("receipt-link").addEventListener("click", onOpen);
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden && $("key-section").hidden) look();
});
look();
