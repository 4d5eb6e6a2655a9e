"""Clients of a completions endpoint, in a process without JAX: a closed loop that streams.

Each of `concurrency` clients sends its next request when the answer before has ended. Run as a
module: a job as JSON on stdin ({url, prompts, concurrency, new_tokens}), answers as JSON on stdout.
"""

import concurrent.futures
import dataclasses
import http.client
import json
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """Times of one request, seconds of one clock; counts as the side reports them."""

  sent: float
  first: float  # the first token, or text, was there
  end: float
  tokens: int
  cached: int  # prompt tokens that were not computed


def drive(
  url: str, prompts: Sequence[Sequence[int]], concurrency: int, new_tokens: int
) -> list[Answer]:
  """All prompts through `url`/v1/completions; RuntimeError where one is not answered whole."""
  ask = lambda prompt: _ask(url, prompt, new_tokens)  # noqa: E731
  with concurrent.futures.ThreadPoolExecutor(concurrency) as clients:
    return list(clients.map(ask, prompts))


def drive_apart(
  url: str, prompts: Sequence[Sequence[int]], concurrency: int, new_tokens: int
) -> list[Answer]:
  """`drive` in a process of its own: its Python does not hold up the server's."""
  job = dict(url=url, prompts=list(map(list, prompts)), concurrency=concurrency)
  done = subprocess.run(
    [sys.executable, "-m", "experiments._serve_load"],
    input=json.dumps(job | {"new_tokens": new_tokens}),
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f"the clients ended with {done.returncode}:\n{done.stderr}")
  return [Answer(**fields) for fields in json.loads(done.stdout)]


def _ask(url: str, prompt: Sequence[int], new_tokens: int) -> Answer:
  body = {"prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0.0, "stream": True}
  body["stream_options"] = {"include_usage": True}
  where = urllib.parse.urlsplit(url)
  connection = http.client.HTTPConnection(where.hostname, where.port, timeout=600)
  try:
    sent, first, usage = time.perf_counter(), None, None
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
      raise RuntimeError(f"status {response.status}: {response.read().decode()}")
    for line in response:
      if not line.startswith(b"data: {"):
        continue
      chunk = json.loads(line[6:])
      if "error" in chunk:
        raise RuntimeError(f"error: {chunk['error']}")
      if first is None and any(choice["text"] for choice in chunk["choices"]):
        first = time.perf_counter()
      usage = chunk.get("usage") or usage
    end = time.perf_counter()
  finally:
    connection.close()
  if usage is None:
    raise RuntimeError("the stream ended without usage")
  return Answer(
    sent=sent,
    first=end if first is None else first,
    end=end,
    tokens=usage["completion_tokens"],
    cached=usage["prompt_tokens_details"]["cached_tokens"],
  )


if __name__ == "__main__":
  print(json.dumps([dataclasses.asdict(x) for x in drive(**json.load(sys.stdin))]))
