// The frame of the page: which view is shown, and the form for the token.

import { hasToken, onUnauthenticated, setToken } from "./api.js";
import { element, ticking } from "./dom.js";
import * as server from "./server.js";
import * as session from "./session.js";
import * as sessions from "./sessions.js";

const main = document.getElementById("main");
const forget = document.getElementById("forget");
let shown = new AbortController();

// begin ends the view that is shown and returns the signal of the next one.
function begin(title) {
  shown.abort();
  shown = new AbortController();
  document.title = title + " – Bivouac";
  main.replaceChildren();
  forget.hidden = !hasToken();
  return shown.signal;
}

// route shows the view that the part of the address after # names. A view that the user
// has chosen gets the focus, at its heading.
function route(chosen) {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [name, chatID] = path.split("/", 2).map(decode);
  for (const link of document.querySelectorAll("nav a")) {
    const current = link.hash === "#/" + (name || "sessions");
    current ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  if (name === "server") {
    server.show(main, begin("Server"));
  } else if (name === "sessions" && chatID) {
    session.show(main, chatID, begin("Session " + chatID));
  } else {
    sessions.show(main, new URLSearchParams(query), begin("Sessions"));
  }
  if (chosen) {
    const heading = main.querySelector("h1");
    heading.tabIndex = -1;
    heading.focus();
  }
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// askForToken shows a form in place of the view, because the API wants a token.
function askForToken(reason) {
  if (main.querySelector("form.token")) {
    return; // several requests were refused
  }
  begin("Token");
  const field = element("input", { id: "token", type: "password", autocomplete: "off", spellcheck: "false", required: true, pattern: "\\s*[!-~]+\\s*" });
  const why = hasToken() ? reason : "This server needs a token.";
  main.append(element("form", {
    class: "token",
    onsubmit: (event) => {
      event.preventDefault();
      setToken(field.value.trim());
      route(true);
    },
  },
  element("h1", {}, "Token"),
  element("p", { role: "alert" }, why),
  element("label", { for: "token" }, "Token"), field,
  element("button", { type: "submit" }, "Go on"),
  element("p", {}, "The token stays in the memory of this tab. It is gone when you close or reload the tab.")));
  setToken("");
  forget.hidden = true;
  field.focus();
}

onUnauthenticated(askForToken);
forget.addEventListener("click", () => {
  setToken("");
  route(true);
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", () => route(true));
setInterval(ticking, 5000);
route(false);
