"""An engine that says what a script says: the service's tests need no model."""

import types

from minicpm_jax import config
from minicpm_jax.infer import engine

TEMPLATE = (
  "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
  "{% if add_generation_prompt %}[a]{% endif %}"
)
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "get-weather",
      "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
  }
]


def bytewise(text):
  """One token a byte, then the end token."""
  return [[b] for b in text.encode()] + [[257]]


class ScriptedEngine:
  """The engine's API over `script(request) -> token lists, one a step`."""

  def __init__(self, script, *, max_batch=2, capacity=200):
    self.script = script
    self.cfg = config.EngineConfig(max_batch=max_batch, capacity=capacity)
    self.stop_ids = (257, 259)
    self.drafter = types.SimpleNamespace(num_nodes=1)
    self.model = types.SimpleNamespace(cfg=types.SimpleNamespace(vocab_size=260))
    self.requests = []
    self.cancelled = []
    self.failure = None
    self._live = {}

  @property
  def num_free_slots(self):
    return self.cfg.max_batch - len(self._live)

  def add(self, request):
    self.requests.append(request)
    uid = len(self.requests)
    stats = engine.Stats(prompt_tokens=len(request.prompt), accepted=[1])
    self._live[uid] = (request, iter(self.script(request)), stats)
    return uid

  def cancel(self, uid):
    if uid not in self._live:
      return None
    self.cancelled.append(uid)
    return engine.Event(uid, [], [], "cancelled", self._live.pop(uid)[2])

  def step(self):
    if self.failure is not None:
      raise self.failure
    events = []
    for uid, (request, steps, stats) in list(self._live.items()):
      tokens = next(steps, [])
      stats.new_tokens += len(tokens)
      reason = "stop" if tokens and tokens[-1] in self.stop_ids else None
      if reason is None and stats.new_tokens >= request.sampling.max_new_tokens:
        reason = "length"
      if reason is not None:
        del self._live[uid]
      logprobs = [-t / 100 for t in tokens] if request.want_logprobs else []
      if tokens or reason:
        tops = [[(t, -t / 100), (t + 1, -t / 50)][: request.num_top_logprobs] for t in tokens]
        tops = tops if request.num_top_logprobs else []
        stats_ = stats if reason else None
        events.append(engine.Event(uid, tokens, logprobs, reason, stats_, tops))
    return events
