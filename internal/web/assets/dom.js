// Elements and small helpers. Every text from the server becomes a text node or the value
// of an attribute that cannot run anything.

// element returns a new element with attributes and children. A child that is no node
// becomes text. Event handlers are functions: {onclick: f}.
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") {
      node.addEventListener(key.slice(2), value);
    } else if (typeof value === "boolean") {
      node.toggleAttribute(key, value);
    } else {
      node.setAttribute(key, value);
    }
  }
  node.append(...children);
  return node;
}

// setText changes the text of a node only if it differs, so that nothing is read out twice.
export function setText(node, text) {
  if (node.textContent !== text) {
    node.textContent = text;
  }
}

// sessionLink returns a link to the view of a chat's session.
export function sessionLink(chatID) {
  return element("a", { href: "#/sessions/" + encodeURIComponent(chatID), class: "id" }, chatID);
}

// stateMark shows a state in a word and a colour.
export function stateMark(state) {
  return element("span", { class: "state " + (/^[a-z_]+$/.test(state) ? state : "") }, state);
}

// moment shows a time and how far it is from now. ticking keeps that up to date.
export function moment(text) {
  const time = new Date(text);
  if (!text || isNaN(time) || time.getUTCFullYear() < 1971) {
    return element("span", {}, "–");
  }
  return element("time", { datetime: time.toISOString(), title: time.toLocaleString() }, relative(time));
}

export function ticking() {
  for (const node of document.querySelectorAll("time")) {
    setText(node, relative(new Date(node.dateTime)));
  }
}

function relative(time) {
  const seconds = Math.round((time - Date.now()) / 1000);
  const size = Math.abs(seconds);
  const text = size < 60 ? size + " s" : size < 3600 ? Math.floor(size / 60) + " min"
    : size < 86400 ? Math.floor(size / 3600) + " h " + Math.floor(size % 3600 / 60) + " min" : Math.floor(size / 86400) + " d";
  return seconds > 0 ? "in " + text : text + " ago";
}

// labelsText shows labels in a fixed order.
export function labelsText(labels) {
  return Object.keys(labels ?? {}).sort().map((key) => key + "=" + labels[key]).join(", ");
}

// sleep waits for some milliseconds, or until signal is aborted.
export function sleep(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}

// refresher returns a function that asks for a run. However often it is asked, there is one
// run at a time, and a pause between two: half a second, or longer if runs take long.
export function refresher(run, signal) {
  let wanted = false;
  let running = false;
  return async function ask() {
    wanted = true;
    if (running) {
      return;
    }
    running = true;
    while (wanted && !signal.aborted) {
      wanted = false;
      const began = performance.now();
      await run().catch(reportError);
      await sleep(Math.max(500, 4 * (performance.now() - began)), signal);
    }
    running = false;
  };
}

// every calls run now and then in an interval while the page is visible.
export async function every(milliseconds, run, signal) {
  while (!signal.aborted) {
    if (!document.hidden) {
      await run().catch(reportError);
    }
    await sleep(milliseconds, signal);
  }
}

// announcer returns a function that tells a text to screen readers. It tells at most one
// text in five seconds, the last one.
export function announcer(signal) {
  const region = document.getElementById("announcement");
  let next = "";
  let waiting = false;
  return async function announce(text) {
    next = text;
    if (waiting) {
      return;
    }
    waiting = true;
    while (next && !signal.aborted) {
      region.textContent = next;
      next = "";
      await sleep(5000, signal);
    }
    waiting = false;
  };
}
