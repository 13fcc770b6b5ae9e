// Follows /events and shows them.  Between two events amounts go on at their rate per second.
// Money is BigInt of 10**-12 pounds, as in the ledger never a float; text goes in as text, never as HTML.
"use strict";

const PLACES = 12;
const byId = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search).get("month") || "";
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let picture = null; // the last event, and when it came
let arrived = 0;
let before = null; // the one before with other usage, for readings a second
let source = null;

function amount(text) {
  const negative = text.startsWith("-");
  const [whole, places = ""] = text.replace("-", "").split(".");
  const value = BigInt(whole + places.slice(0, PLACES).padEnd(PLACES, "0"));
  return negative ? -value : value;
}

function grouped(digits) {
  return digits.replace(/\B(?=(\d{3})+$)/g, ",");
}

// Down to so many places, so that a ticking amount never shows what has not accrued.
function pounds(value, places = 2) {
  const negative = value < 0n;
  const digits = (negative ? -value : value).toString().padStart(PLACES + 1, "0");
  const whole = grouped(digits.slice(0, -PLACES));
  return `${negative ? "−" : ""}£${whole}.${digits.slice(-PLACES).slice(0, places)}`;
}

function decimal(text) {
  const [whole, places] = text.split(".");
  return grouped(whole) + (places ? "." + places : "");
}

const count = (number) => (number === null ? "–" : grouped(String(number)));
const time = (ms) => new Date(ms).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium", timeZone: "Europe/London" });
const monthName = (text) => new Date(text + "-15T12:00:00Z").toLocaleDateString("en-GB", { month: "long", year: "numeric" });

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function tell(state, text) {
  byId("status").dataset.state = state;
  say(byId("status"), text);
  document.body.classList.toggle("away", state === "away");
}

// Rows stay where they are, so a selection or a screen reader does too.  A cell: text or {text, kind, part}.
function fill(id, rows) {
  const table = byId(id);
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, index) => {
    const row = body.rows[index] || body.insertRow();
    cells.forEach((cell, place) => {
      const { text, kind = "", part = null } = typeof cell === "string" ? { text: cell } : cell;
      const target = row.cells[place] || row.insertCell();
      const head = table.tHead.rows[0].cells[place].className;
      const name = [head, kind].filter(Boolean).join(" ");
      if (target.className !== name) target.className = name;
      if (part === null) target.style.removeProperty("--part");
      else target.style.setProperty("--part", part);
      say(target, text);
    });
  });
  table.hidden = rows.length === 0;
  const empty = table.closest(".card").querySelector(".empty");
  if (empty) empty.hidden = rows.length > 0;
}

// A bar's width needs no exactness, so here a number will do.
function part(value, whole) {
  return whole > 0n && value > 0n ? `${Number((value * 1000n) / whole) / 10}%` : "0%";
}

function shares(id, parts, daySeconds) {
  const daily = (each) => (picture.state === "live" ? pounds(amount(each.per_second) * daySeconds) : "–");
  const largest = parts.top.length ? amount(parts.top[0].accrued) : 0n;
  const rows = parts.top.map((each) => [
    { text: each.id || "(nobody yet)", kind: "id", part: part(amount(each.accrued), largest) },
    pounds(amount(each.accrued)),
    daily(each),
  ]);
  if (parts.others) {
    rows.push([
      { text: `${count(parts.count - parts.top.length)} others`, kind: "others" },
      pounds(amount(parts.others.accrued)),
      daily(parts.others),
    ]);
  }
  fill(id, rows);
  say(byId(`${id}-count`), parts.count > parts.top.length ? `largest ${parts.top.length} of ${count(parts.count)}` : "");
}

function show() {
  const p = picture;
  const name = monthName(p.month);
  // Every London day but two has 86,400 seconds; this is a figure to compare by.
  const daySeconds = 86400n;
  document.title = `tribill: ${name}`;
  say(byId("hero-title"), { past: `Accrued in ${name}, all suppliers (month over)`, live: `Accrued in ${name} so far, all suppliers`, future: `${name} has not begun` }[p.state]);
  const rate = amount(p.national.per_second);
  say(byId("per-second"), p.state === "live" ? pounds(rate, 6) : "–");
  say(byId("per-day"), p.state === "live" ? pounds(rate * daySeconds) : "–");
  say(byId("whole-month"), pounds(amount(p.national.whole_month)));
  const gone = ((p.at_ms - p.start_ms) * 100) / (p.end_ms - p.start_ms);
  say(byId("gone"), `${gone.toFixed(1)} %`);
  byId("elapsed").style.width = `${gone}%`;

  say(byId("accepted"), count(p.usage.accepted));
  let note = "readings in the ledger";
  if (before && p.usage.accepted > before.accepted) {
    note = `${count(Math.round(((p.usage.accepted - before.accepted) * 1000) / (arrived - before.arrived)))} a second now`;
  }
  before = { accepted: p.usage.accepted, arrived };
  say(byId("accepted-note"), note);
  say(byId("duplicates"), count(p.usage.duplicates));
  say(byId("refused"), count(p.usage.refused + p.usage.conflicts));
  say(byId("refused-note"), `${count(p.usage.refused)} invalid, ${count(p.usage.conflicts)} conflicting`);
  say(byId("suspense"), decimal(p.suspense.quantity));
  byId("suspense").classList.toggle("warn", p.suspense.services > 0);
  say(byId("suspense-note"), p.suspense.services ? `units at ${count(p.suspense.services)} services no contract covers yet` : "no contract missing");

  shares("suppliers", p.suppliers, daySeconds);
  shares("payers", p.payers, daySeconds);

  const a = p.allocations;
  say(byId("allocations-count"), a.parties ? a.year : "");
  say(byId("allocations-note"), a.parties
    ? `£${decimal(a.allocation)} for the year; £${decimal(a.drawn)} drawn to the end of this month, £${decimal(a.left)} left.` +
      (a.parties > a.shown.length ? ` Least and most left of ${count(a.parties)} parties:` : "")
    : "");
  fill("allocations", a.shown.map((each) => [
    { text: each.party, kind: "id", part: `${Math.max(0, Number(each.left_percent))}%` },
    `£${decimal(each.allocation)}`,
    `£${decimal(each.drawn)}`,
    { text: `£${decimal(each.left)}`, kind: amount(each.left) === 0n ? "warn" : "" },
    each.left_percent,
    { text: each.covered_percent, kind: each.covered_percent === "100.0" ? "" : "warn" },
  ]));

  fill("periods", p.periods.map((each) => [
    each.period,
    count(each.documents),
    pounds(amount(each.net)),
    pounds(amount(each.held)),
    { text: `£${each.drift}`, kind: amount(each.drift) === 0n ? "" : "bad" },
    { text: time(each.closed_at_ms), kind: "nowrap" },
  ]));

  say(byId("suspense-count"), p.suspense.services > p.suspense.largest.length ? `largest ${p.suspense.largest.length} of ${count(p.suspense.services)}` : "");
  fill("suspended", p.suspense.largest.map((each) => [each.item_id, each.ods_code, decimal(each.quantity)]));
  fill("lag", (p.lag || []).map(([stage, behind]) => [stage, { text: count(behind), kind: behind ? "warn" : "" }]));

  say(byId("letters-count"), p.dead_letters.count ? count(p.dead_letters.count) : "");
  fill("letters", p.dead_letters.last.map((each) => [{ text: time(each.at_ms), kind: "nowrap" }, { text: each.agent, kind: "nowrap" }, { text: each.source, kind: "nowrap" }, each.reason]));
  months(p);
  tick();
}

function months(p) {
  const select = byId("month");
  const wanted = ["", ...[...new Set([...p.months, asked || p.month])].sort().reverse()];
  if (wanted.join() !== [...select.options].map((each) => each.value).join()) {
    select.replaceChildren(...wanted.map((each) => new Option(each ? monthName(each) : "Newest with usage", each)));
    select.value = asked;
  }
}

function tick() {
  if (!picture) return;
  const passed = Math.min(performance.now() - arrived, picture.until_ms - picture.at_ms);
  const rate = picture.state === "live" ? amount(picture.national.per_second) : 0n;
  const now = pounds(amount(picture.national.accrued) + (rate * BigInt(Math.max(0, Math.floor(passed)))) / 1000n, 5);
  say(byId("total"), now.slice(0, -3));
  say(byId("fraction"), picture.state === "live" ? now.slice(-3) : "");
}

function connect() {
  if (source) source.close();
  source = new EventSource("events" + (asked ? "?month=" + encodeURIComponent(asked) : ""));
  source.addEventListener("picture", (event) => {
    picture = JSON.parse(event.data);
    arrived = performance.now();
    tell("live", picture.state === "live" ? "Live" : "Up to date");
    show();
  });
  source.addEventListener("away", (event) => tell("away", `Last known figures: ${JSON.parse(event.data).reason}`));
  source.onerror = () => tell("away", source.readyState === EventSource.CLOSED ? "Not served; reload to try again" : "Connection lost, trying again");
}

byId("month").addEventListener("change", (event) => {
  location.search = event.target.value ? "?month=" + encodeURIComponent(event.target.value) : "";
});
// Nobody looks at a hidden page: it costs the ledger nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { source.close(); tell("waiting", "Paused"); } else connect();
});
setInterval(() => { if (!calm.matches) tick(); }, 80);
connect();
