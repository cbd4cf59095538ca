// The server: its description, and answers as they stream in. Addresses are relative to the page, so it works behind a prefix.

/** What the server, or the way to it, refused. `status` is 0 where no response came, or where a stream broke. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const addressOf = (path) => new URL(`v1/${path}`, document.baseURI).href;

/** What can be set, as GET /v1/cascade says it. */
export async function describe(key) {
  const response = await reach("cascade", { headers: headers(key) });
  return response.json();
}

/** The chunks of one chat completion. Throws ApiError, or an AbortError when `signal` stops it. */
export async function* chat(body, key, signal) {
  const sent = { method: "POST", headers: { ...headers(key), "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await reach("chat/completions", sent);
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 0, chunk.error.code);
    yield chunk;
  }
  throw new ApiError("The connection broke before the answer was complete.");
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function reach(path, options) {
  let response;
  try {
    response = await fetch(addressOf(path), { ...options, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text();
  try {
    const { message, code } = JSON.parse(text).error;
    return new ApiError(message, response.status, code);
  } catch {
    return new ApiError(`The server answered with status ${response.status}.`, response.status); // a proxy's words, not ours
  }
}

/** The data of server-sent events; pieces may end anywhere. */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a stream that failed cannot be cancelled, and need not be
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  }
}
