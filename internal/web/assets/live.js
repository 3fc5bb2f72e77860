// The event stream: what happens to sessions, as it happens.

import { Refusal, frames } from "./api.js";
import { sleep } from "./dom.js";

// follow passes the events of a query to handle, until signal is aborted. It connects again
// if the stream ends, and goes on after the last event. A hidden page has no stream, so that
// forgotten tabs hold no connection. begun is called each time the stream has begun, because
// what happened before that may have been missed. It is told whether the stream is a new one
// rather than the rest of the last.
export async function follow(query, { handle, begun, signal }) {
  let index = query.index ?? null; // of the last event
  let isNew = true;
  let pause = 1000;
  signal.addEventListener("abort", () => show(""), { once: true });
  while (!signal.aborted) {
    await visible(signal);
    if (signal.aborted) {
      return;
    }
    const connection = new AbortController();
    const end = () => connection.abort();
    const hide = () => { if (document.hidden) end(); };
    signal.addEventListener("abort", end);
    document.addEventListener("visibilitychange", hide);
    try {
      const parameters = new URLSearchParams(query);
      if (index !== null) {
        parameters.set("index", index);
      }
      let first = true;
      for await (const frame of frames("/v1/events?" + parameters, connection.signal)) {
        if (frame.Error) {
          throw new Refusal(0, frame.Error.code, frame.Error.message);
        }
        if (first) {
          first = false;
          pause = 1000;
          show("Live");
          begun(isNew);
        }
        if (frame.Events?.length) {
          index = frame.Index;
          isNew = false;
          queueMicrotask(() => handle(frame.Events)); // its mistakes are not the stream's
        }
      }
    } catch (err) {
      if (err instanceof Refusal && [400, 401, 403, 404].includes(err.status)) {
        show("Not live");
        return;
      }
      if (err instanceof Refusal && err.code === "index_too_old") {
        index = query.index ?? null;
        isNew = true;
      }
    } finally {
      signal.removeEventListener("abort", end);
      document.removeEventListener("visibilitychange", hide);
      end();
    }
    if (!document.hidden && !signal.aborted) {
      show("Not live: connecting again");
      await sleep(pause, signal);
      pause = Math.min(pause * 2, 30000);
    }
  }
}

function show(text) {
  const mark = document.getElementById("live");
  mark.textContent = text;
  mark.classList.toggle("on", text === "Live");
}

function visible(signal) {
  return new Promise((resolve) => {
    if (!document.hidden || signal.aborted) {
      resolve();
      return;
    }
    const check = () => {
      if (!document.hidden || signal.aborted) {
        document.removeEventListener("visibilitychange", check);
        resolve();
      }
    };
    document.addEventListener("visibilitychange", check);
    signal.addEventListener("abort", check, { once: true });
  });
}
