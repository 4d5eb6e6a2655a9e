"""What the host reads of a prefill and of rounds: tokens, log-probabilities, likeliest tokens."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from minicpm_jax.infer import requests

NO_TOKEN = -1  # in an answer: nothing was emitted here


@flax.struct.dataclass
class Answer:
  """What the host reads. tokens_BRA: of each round, `NO_TOKEN` beyond what a row emitted."""

  tokens_BRA: Any  # int32
  logprobs_BRA: Any  # float32, of the bare model; 0 unless asked for
  top_ids_BRAK: Any  # int32, the likeliest tokens at each place, best first; 0 unless asked for
  top_logprobs_BRAK: Any  # float32
  is_bad_B: Any  # bool, logits were not finite


def no_answer(batch_size: int, rounds: int, num_levels: int, vocab_size: int) -> Answer:
  shape = (batch_size, rounds, num_levels + 1)
  more = (*shape, min(requests.MAX_TOP, vocab_size))
  return Answer(
    tokens_BRA=jnp.full(shape, NO_TOKEN, jnp.int32),
    logprobs_BRA=jnp.zeros(shape, jnp.float32),
    top_ids_BRAK=jnp.zeros(more, jnp.int32),
    top_logprobs_BRAK=jnp.zeros(more, jnp.float32),
    is_bad_B=jnp.zeros(shape[:1], bool),
  )


def put(whole: Answer, round_: Any, one: Answer) -> Answer:
  """An answer of one round, maybe of fewer tokens, in its place."""
  A = one.tokens_BRA.shape[2]
  names = ("tokens_BRA", "logprobs_BRA", "top_ids_BRAK", "top_logprobs_BRAK")
  put = lambda x, y: x.at[:, round_, :A].set(y[:, 0])  # noqa: E731
  arrays = {name: put(getattr(whole, name), getattr(one, name)) for name in names}
  return Answer(**arrays, is_bad_B=whole.is_bad_B | one.is_bad_B)


def likeliest(logits_NV: Any, is_wanted: Any) -> tuple[Any, Any]:
  """(ids [N, K], log-probabilities); zeros where nobody wants them (bool, or False at once)."""
  N, V = logits_NV.shape
  K = min(requests.MAX_TOP, V)

  def found():
    best_NK, ids_NK = jax.lax.top_k(jax.nn.log_softmax(logits_NV.astype(jnp.float32), axis=-1), K)
    return ids_NK.astype(jnp.int32), best_NK

  nothing = (jnp.zeros((N, K), jnp.int32), jnp.zeros((N, K), jnp.float32))
  if is_wanted is False:
    return nothing
  return jax.lax.cond(is_wanted, found, lambda: nothing)
