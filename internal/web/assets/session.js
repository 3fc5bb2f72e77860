// The view of one chat's session: what it is, what happened and why, and its logs.

import { Refusal, frames, get, inWords, remove } from "./api.js";
import { announcer, element, labelsText, moment, refresher, setText, stateMark } from "./dom.js";
import { follow } from "./live.js";

const maxEvents = 200;
const maxLines = 1000; // of logs
const maxCharacters = 1 << 20; // of logs

export function show(main, chatID, signal) {
  const path = "/v1/sessions/" + encodeURIComponent(chatID);
  const failure = element("p", { role: "alert", class: "failure" });
  const facts = element("dl", { class: "facts" });
  const deleteButton = element("button", { type: "button", class: "danger", hidden: true, onclick: confirmDelete }, "Delete the session");
  const timeline = element("ol", { class: "latest" });
  const noEvents = element("p", {}, "Nothing is known of this chat's past.");
  const why = element("div", {}, element("p", {}, "…"));
  const logs = element("section", { "aria-labelledby": "logs" });

  main.append(
    element("p", {}, element("a", { href: "#/sessions" }, "All sessions")),
    element("h1", {}, "Session of chat ", element("span", { class: "id" }, chatID)),
    failure, facts, element("p", {}, deleteButton),
    element("section", { "aria-labelledby": "why" }, element("h2", { id: "why" }, "What happened, and why"), why),
    element("section", { "aria-labelledby": "timeline" }, element("h2", { id: "timeline" }, "Events"), noEvents, timeline),
    logs);

  const announce = announcer(signal);
  let current = null; // the session
  let logsOf = ""; // the session whose logs are shown
  let lastState = "";

  const refresh = refresher(async () => {
    await Promise.all([load(), explain()]);
  }, signal);

  async function load() {
    let capabilities = [];
    try {
      const answer = await get(path, signal);
      current = answer.session;
      capabilities = answer.capabilities ?? [];
      setText(failure, "");
    } catch (err) {
      if (signal.aborted) {
        return;
      }
      if (!(err instanceof Refusal && err.status === 404)) {
        setText(failure, inWords(err));
        return;
      }
      current = null;
      setText(failure, "This chat has no session now.");
    }
    const state = current?.state ?? "gone";
    if (lastState && lastState !== state) {
      announce("The session is " + state + ".");
    }
    lastState = state;
    draw();
    const mayDelete = current !== null && capabilities.includes("write");
    if (!mayDelete && document.activeElement === deleteButton) {
      main.focus();
    }
    deleteButton.hidden = !mayDelete;
    if (current && current.session_id !== logsOf) {
      logsOf = current.session_id;
      showLogs(logs, path, capabilities, signal);
    }
  }

  function draw() {
    facts.hidden = !current;
    if (!current) {
      return;
    }
    const endpoint = current.endpoint ? (current.endpoint.ip.includes(":") ? "[" + current.endpoint.ip + "]" : current.endpoint.ip) + ":" + current.endpoint.port : "–";
    const all = [
      ["State", stateMark(current.state)], ["Reason", current.reason || "–"], ["Agent", current.agent_id],
      ["Endpoint", endpoint], ["Created", moment(current.created_at)], ["Expires", moment(current.expires_at)],
      ["Labels", labelsText(current.labels) || "–"], ["Owner", current.owner || "–"], ["Runtime", current.runtime], ["Warm start", current.warm ? "yes" : "no"],
      ["Container", current.container_id || "–"], ["Volume", current.volume_host_path], ["Session", current.session_id],
    ];
    facts.replaceChildren(...all.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  async function explain() {
    let answer;
    try {
      answer = await get(path + "/why", signal);
    } catch (err) {
      if (!signal.aborted) {
        why.replaceChildren(element("p", {}, err instanceof Refusal && err.status === 404 ? "Nothing is known." : inWords(err)));
      }
      return;
    }
    why.replaceChildren(...answer.sessions.map((session) => element("article", {},
      element("h3", {}, "Session ", element("span", { class: "id" }, session.session_id), " ", stateMark(session.state)),
      element("p", {}, session.outcome),
      element("ol", { class: "latest" }, ...session.events.map((event) => element("li", {},
        moment(event.time), " ", element("span", { class: "source" }, event.source), " ", event.text))))));
  }

  function begun(isNew) {
    if (isNew) {
      timeline.replaceChildren();
    }
    refresh();
  }

  function handle(events) {
    for (const event of events) {
      const { reason, caller } = event.Payload ?? {};
      timeline.prepend(element("li", {}, moment(event.Payload?.time), " ", stateMark(event.Type),
        caller ? " by " + caller : "", reason ? ": " + reason : ""));
    }
    while (timeline.children.length > maxEvents) {
      timeline.lastChild.remove();
    }
    noEvents.hidden = timeline.children.length > 0;
    refresh();
  }

  function confirmDelete() {
    const { agent_id: agentID, session_id: sessionID } = current;
    const problem = element("p", { role: "alert", class: "failure" });
    const dialog = element("dialog", { "aria-labelledby": "confirm", onclose: () => dialog.remove() },
      element("h2", { id: "confirm" }, "Delete the session?"),
      element("p", {}, "This stops the sandbox of chat ", element("span", { class: "id" }, chatID), " of the AI agent ", element("b", {}, agentID),
        ". What is in its volume stays."),
      problem,
      element("button", { type: "button", autofocus: true, onclick: () => dialog.close() }, "Keep it"), " ",
      element("button", { type: "button", class: "danger", onclick: end }, "Delete it"));
    signal.addEventListener("abort", () => dialog.close(), { once: true });

    async function end(event) {
      if (current && current.session_id !== sessionID) {
        setText(problem, "The chat has another session now. Look at it first.");
        return;
      }
      event.target.disabled = true;
      try {
        const answer = await remove(path);
        dialog.close();
        announce(answer.result === "deleted" ? "The session is deleted." : "The chat had no session any more.");
      } catch (err) {
        setText(problem, inWords(err));
        event.target.disabled = false;
      }
      refresh();
    }

    main.append(dialog);
    dialog.showModal();
  }

  refresh();
  follow({ chat_id: chatID, index: 0 }, { handle, begun, signal });
}

// showLogs shows the logs of a session in a section, and follows them.
function showLogs(section, path, capabilities, signal) {
  section.replaceChildren(element("h2", { id: "logs" }, "Logs"));
  if (!capabilities.includes("logs")) {
    section.append(element("p", {}, 'Your token does not allow you to read the logs of this AI agent: it needs a policy with the capability "logs".'));
    return;
  }
  const lines = element("pre", { tabindex: "0", role: "region", "aria-label": "Lines of the log" });
  const note = element("p", { role: "status" });
  const choice = (name, checked) => element("label", {}, element("input", { type: "radio", name: "stream", value: name, checked, onchange: () => start(name) }), " " + name);
  section.append(element("fieldset", {}, element("legend", {}, "Stream"), choice("stdout", true), choice("stderr", false)), lines, note);

  let reading = new AbortController();
  signal.addEventListener("abort", () => reading.abort(), { once: true });
  start("stdout");

  async function start(stream) {
    reading.abort();
    reading = new AbortController();
    const { signal: mine } = reading;
    lines.replaceChildren();
    setText(note, "");
    const log = newLog(lines);
    try {
      for await (const frame of frames(path + "/logs?" + new URLSearchParams({ type: stream, follow: true, tail: 200 }), mine)) {
        if (frame.end) {
          setText(note, "The logs ended: " + frame.end.state + (frame.end.reason ? ": " + frame.end.reason : "") + ".");
        } else if (frame.data_base64) {
          log.add(Uint8Array.from(atob(frame.data_base64), (c) => c.charCodeAt(0)));
        } else if (frame.data) {
          log.add(new TextEncoder().encode(frame.data));
        }
      }
      log.finish();
      setText(note, note.textContent || "The logs broke off.");
    } catch (err) {
      if (!mine.aborted) {
        setText(note, inWords(err));
      }
    }
  }
}

// newLog collects bytes and shows them as lines, at most ten times a second. It keeps the
// last lines. If the end is in view, it stays in view.
function newLog(pre) {
  const decoder = new TextDecoder();
  let waiting = "";
  let scheduled = false;

  function draw() {
    scheduled = false;
    const atEnd = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 40;
    const all = (pre.textContent + waiting).slice(-maxCharacters).split("\n");
    waiting = "";
    pre.textContent = all.slice(-maxLines - 1).join("\n");
    if (atEnd) {
      pre.scrollTop = pre.scrollHeight;
    }
  }

  function show(text) {
    waiting = (waiting + text).slice(-maxCharacters);
    if (!scheduled) {
      scheduled = true;
      setTimeout(draw, 100);
    }
  }

  return {
    add: (bytes) => show(decoder.decode(bytes, { stream: true })),
    finish: () => show(decoder.decode()),
  };
}
