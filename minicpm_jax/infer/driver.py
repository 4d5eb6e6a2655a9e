"""Running requests to their end on an engine: streams, batches of prompts, whole answers."""

import abc
import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence

from minicpm_jax import config
from minicpm_jax.infer.requests import Event, Generation, Request, RequestError


class Driver(abc.ABC):
  """What `Engine` offers on top of add, cancel and step."""

  @abc.abstractmethod
  def add(self, request: Request) -> int: ...

  @abc.abstractmethod
  def cancel(self, uid: int) -> Event | None: ...

  @abc.abstractmethod
  def step(self) -> list[Event]: ...

  def add_all(self, requests: Sequence[Request]) -> list[int]:
    """Queues all of them, or none where one can never be served."""
    uids = []
    try:
      for request in requests:
        uids.append(self.add(request))
    except BaseException:
      for uid in uids:
        self.cancel(uid)
      raise
    return uids

  def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
    """Events of these requests as they come; ids count from the first request's (the iterator
    closed early cancels what is left). Several streams may be read in turn."""
    yield from self._events(self.add_all(requests))

  def _events(self, uids: Sequence[int]) -> Iterator[Event]:
    left, mine = set(uids), collections.deque()
    self._boxes.update(dict.fromkeys(uids, mine))
    try:
      while left:
        while mine:
          event = mine.popleft()
          if isinstance(event, RequestError):
            raise event
          if event.finish_reason is not None:
            left.discard(event.id)
          yield event
        if left:
          self._step_into_boxes()
    finally:
      for uid in uids:
        del self._boxes[uid]
      for uid in left:
        self.cancel(uid)

  def _step_into_boxes(self) -> None:
    """A step moves every request, whoever reads it: each one's events wait in its reader's box."""
    try:
      found = self.step()
    except RequestError as error:
      if error.id not in self._boxes:
        raise
      found = [error]
    for event in found:
      if event.id in self._boxes:
        self._boxes[event.id].append(event)

  @functools.cached_property
  def _boxes(self) -> dict[int, collections.deque[Event | RequestError]]:
    return {}

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: config.SamplingConfig | None = None,
    *,
    stop_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    want_logprobs: bool = False,
  ) -> Generation:
    """Decodes prompts to the end. `seeds` gives every prompt its own noise."""
    sampling = config.SamplingConfig() if sampling is None else sampling
    seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
      raise ValueError(
        f"seeds: found {len(seeds)}, expected one for each of {len(prompts)} prompts"
      )
    requests = [
      Request(prompt, dataclasses.replace(sampling, seed=seed), stop_ids, None, want_logprobs)
      for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return self.collect(requests)

  def collect(self, requests: Sequence[Request]) -> Generation:
    """Runs requests to the end, in their order; where one fails, all of them are cancelled."""
    uids = self.add_all(requests)
    tokens = {uid: [] for uid in uids}
    logprobs = {uid: [] for uid in uids}
    tops = {uid: [] for uid in uids}
    ends: dict[int, Event] = {}
    for event in self._events(uids):
      tokens[event.id] += event.tokens
      logprobs[event.id] += event.logprobs
      tops[event.id] += event.top_logprobs
      if event.finish_reason is not None:
        ends[event.id] = event
    return Generation(
      tokens=[tokens[uid] for uid in uids],
      logprobs=[logprobs[uid] for uid in uids],
      finish_reason=[ends[uid].finish_reason for uid in uids],
      stats=[ends[uid].stats for uid in uids],
      top_logprobs=[tops[uid] for uid in uids],
    )
