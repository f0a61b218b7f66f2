// Questions to the server. What it refuses becomes an Error with its one line.

const HEADERS = { "X-Burnish": "1" };

async function failed(answer) {
  let told = {};
  const text = await answer.text();
  try { told = JSON.parse(text); } catch { told = { error: text.trim() || `the server said ${answer.status}` }; }
  return Object.assign(new Error(told.error), told, { status: answer.status });
}

export async function get(path) {
  const answer = await fetch(path, { headers: HEADERS });
  if (!answer.ok) throw await failed(answer);
  return answer.json();
}

export async function send(method, path, body, type) {
  const answer = await fetch(path, { method, body: body && !type ? JSON.stringify(body) : body,
    headers: body ? { ...HEADERS, "Content-Type": type || "application/json" } : HEADERS });
  if (!answer.ok) throw await failed(answer);
  return answer.json();
}

/** One of the long questions; progress(done, total) as it is answered. */
export async function ask(what, body = {}, progress = () => {}, signal = undefined) {
  const answer = await fetch(`/api/ask/${what}`, { method: "POST", body: JSON.stringify(body), signal,
    headers: { ...HEADERS, "Content-Type": "application/json" } });
  if (!answer.ok) throw await failed(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server stopped answering");
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      const message = JSON.parse(line);
      if (message.progress) progress(...message.progress);
      else if (message.error) throw Object.assign(new Error(message.error), message);
      else return message.answer;
    }
  }
}
