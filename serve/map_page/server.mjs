/** What is asked of the server, and why it was not had. */

export const HOME = new URL(".", document.baseURI).href;
const PATIENCE = 30_000; // ms

/** An answer that was not had. */
export class Failure extends Error {
  /** `passing`: the same question may be answered later; `wait`: in how many seconds, where the server says so. */
  constructor(words, passing, wait = 0) {
    super(words);
    Object.assign(this, { passing, wait });
  }
}

/** The JSON at a path of this server. */
export const ask = (path) => get(HOME + path, (answer) => answer.json());

/** What `read` makes of the answer; a `Failure` if there is none, unless `signal` gave the question up. */
export async function get(url, read, signal = new AbortController().signal) {
  let refused;
  try {
    const given = AbortSignal.any([signal, AbortSignal.timeout(PATIENCE)]);
    const answer = await fetch(url, { headers: { accept: "application/json, image/*" }, signal: given });
    if (answer.ok) return await read(answer);
    refused = answer;
  } catch (error) {
    throw signal.aborted ? error : new Failure("the server does not answer", true);
  }
  const { detail } = await refused.json().catch(() => ({}));
  const { status, headers } = refused;
  const passing = status >= 500 || status === 429;
  throw new Failure(detail ?? `the server answers with an error (${status})`, passing, Number(headers.get("retry-after")) || 0);
}
