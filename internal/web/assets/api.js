// Requests to the API of this server. The token lives here and nowhere else: not in
// storage, not in a cookie, not in a URL. It ends with the tab.

let token = "";

export function setToken(text) { token = text; }
export function hasToken() { return token !== ""; }

// Refusal is an answer of the API that is an error.
export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let unauthenticated = () => {};

// onUnauthenticated sets what is called if the API asks for a token, or for another one.
export function onUnauthenticated(call) { unauthenticated = call; }

// inWords says what went wrong, for a person.
export function inWords(err) {
  if (!(err instanceof Refusal)) {
    return "The server cannot be reached.";
  }
  if (err.code === "permission_denied") {
    return "Your token does not allow this: " + err.message;
  }
  return err.message;
}

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (token) {
    headers["X-Bivouac-Token"] = token;
  }
  const response = await fetch(path, { method: options.method, headers, signal: options.signal, cache: "no-store", redirect: "error" });
  if (response.ok || response.status === options.also) {
    return response;
  }
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Something in between has answered, not the API.
  }
  const refusal = new Refusal(response.status, error.code ?? "", error.message ?? "The server answered with status " + response.status + ".");
  if (refusal.status === 401) {
    unauthenticated(refusal.message);
  }
  throw refusal;
}

// get returns an answer in JSON. also is a status that is no error.
export async function get(path, signal, also) {
  return (await send(path, { signal, also })).json();
}

export async function getText(path, signal) {
  return (await send(path, { signal })).text();
}

export async function remove(path) {
  return (await send(path, { method: "DELETE" })).json();
}

// maxFrame is the longest line of a stream that is read, in characters.
const maxFrame = 4 << 20;

// frames yields the JSON values of a stream, one to a line. It yields {} when the stream
// has begun.
export async function* frames(path, signal) {
  const response = await send(path, { signal, headers: { Accept: "application/x-ndjson" } });
  yield {};
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) {
      return;
    }
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.trim()) {
        yield JSON.parse(line);
      }
    }
    if (rest.length > maxFrame) {
      throw new Error("a line of the stream is too long");
    }
  }
}
