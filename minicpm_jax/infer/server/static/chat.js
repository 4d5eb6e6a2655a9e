"use strict";
// The chat page: keeps the conversation, streams answers from /v1/chat/completions.

const get = (id) => document.getElementById(id);
const messages = [];
let running = null; // AbortController of the answer under way

function addTurn(role, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text; // never HTML
  get("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function setRunning(controller) {
  running = controller;
  get("send").disabled = controller !== null;
  get("stop").disabled = controller === null;
}

// Yields the data of server-sent events, whatever the pieces that the network delivers.
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    buffer += decoder.decode(value || new Uint8Array(), { stream: !done });
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const event = buffer.slice(0, end);
      buffer = buffer.slice(end + 2);
      if (event.startsWith("data: ")) yield event.slice(6);
    }
    if (done) return;
  }
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  addTurn("user", text);
  const turn = addTurn("assistant", "");
  const controller = new AbortController();
  setRunning(controller);
  get("status").textContent = "…";
  const begin = performance.now();
  let answer = "";
  try {
    const system = get("system").value.trim();
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal: controller.signal,
      body: JSON.stringify({
        messages: system ? [{ role: "system", content: system }, ...messages] : messages,
        temperature: Number(get("temperature").value),
        max_tokens: Number(get("max_tokens").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) {
      const body = await response.json().catch(() => ({}));
      throw new Error(body.error ? body.error.message : `HTTP ${response.status}`);
    }
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        answer += choice.delta.content || "";
        turn.textContent = answer;
        if (choice.finish_reason === "length") turn.title = "cut at max tokens";
      }
      turn.scrollIntoView({ block: "end" });
      if (chunk.usage) {
        const seconds = (performance.now() - begin) / 1000;
        const { prompt_tokens: read, completion_tokens: said } = chunk.usage;
        const rate = (said / seconds).toFixed(1);
        get("status").textContent = `${read} prompt tokens, ${said} new tokens, ${rate} tokens/s`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      get("status").textContent = "stopped";
    } else {
      get("status").textContent = "";
      addTurn("error", error.message);
    }
  } finally {
    if (answer) {
      messages.push({ role: "assistant", content: answer });
    } else {
      messages.pop(); // the question, so that it can be asked again
      turn.remove();
    }
    setRunning(null);
    get("prompt").focus();
  }
}

get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = get("prompt").value.trim();
  if (!text || running) return;
  get("prompt").value = "";
  ask(text);
});
get("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    get("form").requestSubmit();
  }
});
get("stop").addEventListener("click", () => running && running.abort());
get("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  get("log").replaceChildren();
  get("status").textContent = "";
});
fetch("v1/models")
  .then((response) => response.json())
  .then((body) => { get("model").textContent = body.data[0].id; })
  .catch(() => {});
