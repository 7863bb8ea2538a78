// Requests to the server, and its refusals in words.

const KEY = "qpeft-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** A request that failed; `status` is 0 where no answer came. */
export class Trouble extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request and return the JSON of its answer; a body makes it a POST. */
export async function ask(path, { body, signal } = {}) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      cache: "no-store",
    });
    const answer = await response.json().catch(() => null);
    if (response.ok && answer !== null) return answer;
    throw new Trouble(response.status, words(response, answer?.error?.message ?? answer?.message ?? response.statusText));
  } catch (error) {
    if (error instanceof Trouble || error.name === "AbortError") throw error;
    throw new Trouble(0, "The server cannot be reached. Is it still running?");
  }
}

function words(response, reason) {
  const wait = response.headers.get("Retry-After");
  switch (response.status) {
    case 401:
      return key.get() ? "The server does not accept this API key." : "This server needs an API key.";
    case 404:
      return `The server does not have that: ${reason}.`;
    case 408:
    case 504:
      return `It took too long: ${reason}.`;
    case 413:
      return `That is too much at once: ${reason}.`;
    case 400:
    case 422:
      return `The server cannot use this input: ${reason}.`;
    case 429:
      return `The server is busy: its queue is full. Try again in ${wait ?? "a few"} s.`;
    case 503:
      return `Not yet: ${reason}.`;
    default:
      return `The server failed (${response.status}): ${reason}.`;
  }
}
