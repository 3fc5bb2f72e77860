// The view of all sessions: one page of them, counts by state, and what happened last.

import { get, inWords } from "./api.js";
import { announcer, element, every, labelsText, moment, refresher, sessionLink, setText, sleep, stateMark } from "./dom.js";
import { follow } from "./live.js";

const perPage = 50;
const maxLatest = 10;
const states = ["creating", "running", "stopping", "dead", "lost"];
const columns = ["Chat", "Agent", "State", "Runtime", "Created", "Expires", "Reason", "Labels"];

export function show(main, parameters, signal) {
  const filter = Object.fromEntries(["agent_id", "state", "text"].map((name) => [name, parameters.get(name) ?? ""]));
  let pages = [""]; // the tokens of this page and of those before it
  let nextToken = "";

  const failure = element("p", { role: "alert", class: "failure" });
  const agent = element("input", { id: "agent", type: "search", value: filter.agent_id, autocomplete: "off", spellcheck: "false" });
  const text = element("input", { id: "text", type: "search", value: filter.text, maxlength: "256", autocomplete: "off", spellcheck: "false" });
  const stateButtons = new Map(["", ...states].map((state) => [state, element("button", {
    type: "button", "aria-pressed": String(filter.state === state), onclick: () => choose(state),
  }, element("span", {}, state || "all"), " ", element("b", {}, "…"))]));
  const body = element("tbody", { role: "rowgroup" });
  const table = element("table", { role: "table", id: "sessions" },
    element("caption", {}, "Sessions"),
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...columns.map((name) => element("th", { scope: "col", role: "columnheader" }, name)))),
    body);
  const empty = element("p", { hidden: true });
  const previous = element("button", { type: "button", onclick: () => turn(-1) }, "Previous page");
  const next = element("button", { type: "button", onclick: () => turn(1) }, "Next page");
  const position = element("span", {}, "Page 1");
  const latest = element("ol", { class: "latest" });

  main.append(
    element("h1", {}, "Sessions"),
    element("form", { role: "search", class: "filters", onsubmit: (event) => { event.preventDefault(); apply(); }, oninput: soon },
      element("div", {}, element("label", { for: "agent" }, "ID of the AI agent"), agent),
      element("div", {}, element("label", { for: "text" }, "Text in chat, agent, label or reason"), text)),
    element("div", { class: "states", role: "group", "aria-label": "State" }, ...stateButtons.values()),
    failure, table, empty,
    element("nav", { class: "pager", "aria-label": "Pages" }, previous, position, next),
    element("section", { "aria-labelledby": "latest" }, element("h2", { id: "latest" }, "Latest changes"), latest));

  const rows = new Map(); // by chat
  const refresh = refresher(load, signal);
  const recount = refresher(count, signal);
  const announce = announcer(signal);

  async function load() {
    const query = new URLSearchParams({ per_page: perPage });
    for (const [name, value] of [...Object.entries(filter), ["next_token", pages.at(-1)]]) {
      if (value) {
        query.set(name, value);
      }
    }
    const asked = query.toString();
    try {
      const page = await get("/v1/sessions?" + asked, signal);
      setText(failure, "");
      nextToken = page.next_token;
      draw(page.sessions);
    } catch (err) {
      if (!signal.aborted) {
        setText(failure, inWords(err));
      }
    }
  }

  // draw keeps the rows of sessions that stay, and with them the focus.
  function draw(sessions) {
    const old = new Map(rows);
    rows.clear();
    const kept = sessions.map((session) => {
      const row = old.get(session.chat_id) ?? element("tr", { role: "row" }, ...columns.map((name) => element("td", { role: "cell", "data-name": name })));
      const shown = JSON.stringify(session);
      if (row.dataset.shown !== shown) {
        row.dataset.shown = shown;
        fill(row, session);
      }
      rows.set(session.chat_id, row);
      return row;
    });
    if (kept.length !== body.children.length || kept.some((row, i) => body.children[i] !== row)) {
      body.replaceChildren(...kept);
    }
    table.hidden = sessions.length === 0;
    empty.hidden = sessions.length > 0;
    setText(empty, filter.agent_id || filter.state || filter.text ? "No session matches." : "There are no sessions.");
    setText(position, "Page " + pages.length);
    previous.disabled = pages.length === 1;
    next.disabled = nextToken === "";
  }

  async function count() {
    try {
      const answer = await get("/v1/sessions/counts" + (filter.agent_id ? "?" + new URLSearchParams({ agent_id: filter.agent_id }) : ""), signal);
      const all = Object.values(answer.counts).reduce((sum, n) => sum + n, 0);
      for (const [state, button] of stateButtons) {
        setText(button.lastChild, (state ? answer.counts[state] : all).toLocaleString());
      }
    } catch {
      // The list tells what is wrong.
    }
  }

  function choose(state) {
    filter.state = state;
    for (const [name, button] of stateButtons) {
      button.setAttribute("aria-pressed", String(name === state));
    }
    apply();
  }

  let typing = new AbortController();
  async function soon() {
    typing.abort();
    typing = new AbortController();
    const { signal: typed } = typing;
    await sleep(300, typed);
    if (!typed.aborted) {
      apply();
    }
  }

  function apply() {
    typing.abort();
    filter.agent_id = agent.value.trim();
    filter.text = text.value.trim();
    const query = new URLSearchParams(Object.entries(filter).filter(([, value]) => value)).toString();
    history.replaceState(null, "", "#/sessions" + (query ? "?" + query : ""));
    pages = [""];
    refresh();
    recount();
  }

  function turn(by) {
    pages = by < 0 ? pages.slice(0, -1) : [...pages, nextToken];
    refresh();
  }

  function handle(events) {
    for (const event of events) {
      latest.prepend(element("li", {}, moment(event.Payload?.time), " ", stateMark(event.Type), " ", event.Topic === "Pool" ? event.Key : sessionLink(event.Key), " ", String(event.Payload?.agent_id ?? "")));
    }
    while (latest.children.length > maxLatest) {
      latest.lastChild.remove();
    }
    const last = events.at(-1);
    announce("Session " + last.Type + ": AI agent " + (last.Payload?.agent_id ?? "unknown"));
    refresh();
  }

  signal.addEventListener("abort", () => typing.abort(), { once: true });
  refresh();
  every(5000, count, signal);
  follow({}, { handle, begun: refresh, signal });
}

function fill(row, session) {
  const contents = [
    sessionLink(session.chat_id), session.agent_id, stateMark(session.state), session.runtime + (session.warm ? ", warm" : ""),
    moment(session.created_at), moment(session.expires_at), session.reason, labelsText(session.labels),
  ];
  contents.forEach((content, i) => {
    const cell = row.children[i];
    // The link stays the same node: it may have the focus.
    if (i > 0 || !cell.firstChild) {
      cell.replaceChildren(content);
    }
  });
}
