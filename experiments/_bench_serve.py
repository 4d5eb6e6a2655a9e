"""What bench_serve measures with: the server on loopback, and its engine alone as the baseline."""

import collections
import contextlib
import itertools
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments import _serve_load
from minicpm_jax import config
from minicpm_jax.core import pictures
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.server import app, service

HTTP, ALONE = "http", "engine alone"


def prompts_of(tok: Any, text: str, num: int, length: int) -> list[list[int]]:
  """`num` prompts of the text's tokens in random order: no two begin alike for the prompt cache."""
  ids = np.unique(tok.encode(text))
  return np.random.default_rng(0).choice(ids, (num, length)).tolist()


@contextlib.contextmanager
def serving(engine: engine_lib.Engine, tok: Any, max_queue: int) -> Iterator[str]:
  """The base URL of a server of this engine on a free loopback port."""
  cfg = config.ServerConfig(port=0, max_queue=max_queue, shutdown_seconds=5.0)
  server = app.make_server(service.ChatService(engine, tok, name="bench", cfg=cfg))
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  while not server.started:
    if not thread.is_alive():
      raise RuntimeError("the server did not start")
    thread.join(0.01)
  try:
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
  finally:
    server.should_exit = True
    thread.join()


def alone(
  engine: engine_lib.Engine, prompts: Sequence[Sequence[int]], concurrency: int, new_tokens: int
) -> list[_serve_load.Answer]:
  """The same closed loop without HTTP, text and threads: requests added as others end."""
  waiting, done = collections.deque(prompts), []
  sent, first, counts = {}, {}, collections.Counter()
  sampling = config.SamplingConfig(max_new_tokens=new_tokens)
  while waiting or len(done) < len(sent):
    while waiting and len(sent) - len(done) < concurrency:
      uid = engine.add(engine_lib.Request(waiting.popleft(), sampling))
      sent[uid] = time.perf_counter()
    for event in engine.step():
      now = time.perf_counter()
      first.setdefault(event.id, now)
      counts[event.id] += len(event.tokens)
      if event.finish_reason is not None:
        times = dict(sent=sent[event.id], first=first[event.id], end=now)
        more = dict(tokens=counts[event.id], cached=event.stats.cached_tokens)
        done.append(_serve_load.Answer(**times, **more))
  return done


def row(side: str, concurrency: int, answers: Sequence[_serve_load.Answer]) -> dict[str, Any]:
  """Rates over the whole run, and quantiles over its requests (milliseconds)."""
  seconds = max(a.end for a in answers) - min(a.sent for a in answers)
  first = 1e3 * np.asarray([a.first - a.sent for a in answers])
  gaps = [1e3 * (a.end - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1]
  return {
    "side": side,
    "concurrency": concurrency,
    "requests": len(answers),
    "requests/s": len(answers) / seconds,
    "tokens/s": sum(a.tokens for a in answers) / seconds,
    "first token p50 ms": float(np.quantile(first, 0.5)),
    "first token p95 ms": float(np.quantile(first, 0.95)),
    "ms a token p50": float(np.quantile(gaps, 0.5)) if gaps else 0.0,
    "cached prompt tokens": sum(a.cached for a in answers),
  }


def num_prompts(max_batch: int, concurrencies: Sequence[int], min_requests: int) -> int:
  """Prompts that `measure` wants: of both sides at every concurrency, and to compile with."""
  return 2 * max_batch + 2 * sum(_num_requests(concurrencies, min_requests).values())


def _num_requests(concurrencies: Sequence[int], min_requests: int) -> dict[int, int]:
  return {c: max(min_requests, 2 * c) for c in concurrencies}


def measure(
  engine: engine_lib.Engine,
  tok: Any,
  prompts: Sequence[Sequence[int]],
  concurrencies: Sequence[int],
  new_tokens: int,
  min_requests: int,
) -> list[dict[str, Any]]:
  """A row a side and concurrency, the sides in turn: two requests a client or `min_requests`.

  The engine without stop ids, so that every answer has `new_tokens`. What it compiles is compiled
  before the first timed request. Every request has a prompt of its own (`num_prompts`): the prompt
  cache would hold those of the runs before.
  """
  need = num_prompts(engine.cfg.max_batch, concurrencies, min_requests)
  if len(prompts) < need:
    raise ValueError(f"prompts: found {len(prompts)}, expected at least {need}")
  rows, fresh = [], iter(prompts)
  take = lambda num: list(itertools.islice(fresh, num))  # noqa: E731
  engine.warm_up(engine.cfg.capacity)
  alone(engine, take(2 * engine.cfg.max_batch), engine.cfg.max_batch, new_tokens)
  for c, num in _num_requests(concurrencies, min_requests).items():
    own = alone(engine, take(num), c, new_tokens)
    with serving(engine, tok, max_queue=max(concurrencies)) as url:
      answers = _serve_load.drive_apart(url, take(num), c, new_tokens)
    pair = [row(HTTP, c, answers), row(ALONE, c, own)]
    pair[0]["of engine alone"] = pair[0]["tokens/s"] / pair[1]["tokens/s"]
    pair[1]["of engine alone"] = 1.0
    rows += pair
  return rows


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]], title: str) -> None:
  """Throughput and time to the first token over the number of clients."""
  fig, (left, right) = pictures.figure(2, width=5, height=3.6)
  for side, color in ((HTTP, "tab:blue"), (ALONE, "tab:gray")):
    mine = [r for r in rows if r["side"] == side]
    xs = [r["concurrency"] for r in mine]
    left.plot(xs, [r["tokens/s"] for r in mine], "o-", color=color, label=side)
    for key, style in (("first token p50 ms", "o-"), ("first token p95 ms", "^--")):
      label = f"{side}, {key.split()[2]}"
      right.plot(xs, [r[key] for r in mine], style, color=color, label=label)
  left.set(xlabel="clients", ylabel="tokens/s", xscale="log", ylim=(0, None))
  right.set(xlabel="clients", ylabel="time to first token, ms", xscale="log", yscale="log")
  for ax in (left, right):
    ax.set_xticks(xs, xs)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
  fig.suptitle(title, fontsize=10)
  pictures.save(fig, path, dpi=120)
