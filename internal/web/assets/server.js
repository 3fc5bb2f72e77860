// The view of the server that answers: its health, its creates, and what it consists of.

import { Refusal, get, getText, inWords } from "./api.js";
import { element, every, moment, setText, stateMark } from "./dom.js";
import { minus, parse, quantile, total, totals } from "./metrics.js";

// What servers had measured when the page first saw them, by the time of their start.
// Behind a load balancer another server may answer each time.
const firstSeen = new Map();

export function show(main, signal) {
  const health = element("div", {});
  const creates = element("div", {});
  const refusals = element("div", {});
  const pools = element("div", {});
  const parts = element("div", {});
  main.append(
    element("h1", {}, "Server"),
    element("section", { "aria-labelledby": "health" }, element("h2", { id: "health" }, "Health"), health),
    element("section", { "aria-labelledby": "creates" }, element("h2", { id: "creates" }, "Starts of sandboxes"), creates),
    element("section", { "aria-labelledby": "refusals" }, element("h2", { id: "refusals" }, "Refused requests"), refusals),
    element("section", { "aria-labelledby": "pools" }, element("h2", { id: "pools" }, "Pools"), pools),
    element("section", { "aria-labelledby": "parts" }, element("h2", { id: "parts" }, "Parts"), parts));

  every(5000, async () => {
    await Promise.all([
      part([health], async () => drawHealth(health, await get("/v1/agent/health", signal, 503))),
      part([creates, refusals], async () => drawMetrics(creates, refusals, parse(await getText("/v1/metrics", signal)))),
      part([pools], async () => drawPools(pools, await get("/v1/pools", signal))),
      part([parts], async () => drawParts(parts, await get("/v1/agent/self", signal))),
    ]);
  }, signal);

  // part shows in its places why what they need could not be had.
  async function part(places, draw) {
    try {
      await draw();
    } catch (err) {
      if (signal.aborted) {
        return;
      }
      for (const place of places) {
        const text = err instanceof Refusal && err.code === "permission_denied" && places.length > 1
          ? 'This needs a policy with metrics = "read". ' + err.message : inWords(err);
        if (place.textContent !== text) {
          place.replaceChildren(element("p", {}, text));
        }
      }
    }
  }
}

function drawHealth(place, health) {
  const failing = health.status !== "ok";
  const overall = element("p", {}, stateMark(failing ? "failing" : "ok"), failing && health.error ? " " + health.error.message : "");
  if (!health.checks) {
    place.replaceChildren(overall, element("p", {}, 'Details need a policy with operator = "read".'));
    return;
  }
  place.replaceChildren(overall, table("Checks", ["Check", "Status", "Reason"],
    Object.keys(health.checks).sort().map((name) => [name, stateMark(health.checks[name].status), health.checks[name].error ?? ""])));
}

function drawMetrics(creates, refusals, samples) {
  const isStart = (labels) => labels.result === "created" || labels.result === "replaced";
  const started = total(samples, "process_start_time_seconds");
  const now = {
    time: Date.now() / 1000,
    count: total(samples, "sandbox_create_duration_seconds_count", isStart),
    buckets: totals(samples, "sandbox_create_duration_seconds_bucket", "le", isStart),
    refusals: totals(samples, "sandbox_refusal_total", "limit"),
  };
  if (!firstSeen.has(started)) {
    firstSeen.set(started, now);
  }
  const first = firstSeen.get(started);
  const perMinute = (count, seconds) => seconds < 1 ? "–" : (60 * count / seconds).toFixed(1);
  const since = minus(now.buckets, first.buckets);
  creates.replaceChildren(table("Starts of sandboxes by this server", ["", "Since you first opened this view", "Since the server started"], [
    ["Starts", String(now.count - first.count), String(now.count)],
    ["Starts per minute", perMinute(now.count - first.count, now.time - first.time), perMinute(now.count, now.time - started)],
    ["p50 of a create", duration(quantile(since, 0.5)), duration(quantile(now.buckets, 0.5))],
    ["p99 of a create", duration(quantile(since, 0.99)), duration(quantile(now.buckets, 0.99))],
  ]));
  const refused = minus(now.refusals, first.refusals);
  refusals.replaceChildren(now.refusals.size === 0 ? element("p", {}, "This server has refused no request.")
    : table("Requests that this server refused", ["Limit", "Since you first opened this view", "Since the server started"],
      [...now.refusals.keys()].sort().map((limit) => [limit, String(refused.get(limit)), String(now.refusals.get(limit))])));
}

function duration(seconds) {
  if (isNaN(seconds)) {
    return "–";
  }
  if (seconds === Infinity) {
    return "over 5 min";
  }
  return seconds < 1 ? Math.round(seconds * 1000) + " ms" : seconds.toFixed(1) + " s";
}

function drawPools(place, answer) {
  place.replaceChildren(answer.pools.length === 0 ? element("p", {}, "There are no pools of started sandboxes.")
    : table("Pools of started sandboxes", ["Pool", "Runtime", "Size", "Ready", "Starting", "Ending"],
      answer.pools.map((p) => [p.name, p.runtime, ...[p.size, p.ready, p.starting, p.ending].map(String)])));
}

function drawParts(place, self) {
  const facts = [["Version", self.version + (self.revision ? " (" + self.revision + ")" : "")], ["Instance", self.instance || "–"]];
  place.replaceChildren(
    element("dl", { class: "facts" }, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    table("Runtimes", ["Runtime", "Version"], self.runtimes.map((r) => [r.name, r.version || "does not run"])));
  if (self.replicas) {
    place.append(table("Replicas", ["Replica", "Version", "Addresses", "Started"],
      self.replicas.map((r) => [r.name, r.version, r.addresses.join(", "), moment(r.started_at)])));
  }
}

function table(caption, columns, rows) {
  return element("table", { role: "table" }, element("caption", {}, caption),
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...columns.map((name) => element("th", { scope: "col", role: "columnheader" }, name)))),
    element("tbody", { role: "rowgroup" }, ...rows.map((cells) => element("tr", { role: "row" },
      ...cells.map((cell, i) => i === 0 ? element("th", { scope: "row", role: "rowheader", "data-name": columns[0] }, cell)
        : element("td", { role: "cell", "data-name": columns[i] }, cell))))));
}
