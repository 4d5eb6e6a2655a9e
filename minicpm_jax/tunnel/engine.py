"""Compiled programs of small runs, one per shape: init, many steps, scores of rows.

`advance` takes the number of steps as data, so a program serves every horizon and branch point; the
learning rate, the schedule and the muP constants are data too (`knobs`). A call with 0 steps only
compiles. Runs are stacked in front, [R, ...]:

  vmap   all R in one step: for accelerators, where small matrices leave most of the chip idle
  loop   R = 1, run after run through the same program: on a CPU a batch of runs falls out of the
         cache and takes longer than its parts (experiments.bench_tunnel measures both)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minicpm_jax import config
from minicpm_jax.core import rng, types
from minicpm_jax.models import transformer
from minicpm_jax.optim import build, schedules
from minicpm_jax.tunnel import knobs as knobs_lib
from minicpm_jax.tunnel import plan
from pallas_kernels.fused_ce import api as fused_ce

Batching = Literal["auto", "loop", "vmap"]


class State(NamedTuple):
  """All that a run carries; the data position is `step`."""

  step: Any  # int32
  params: Any  # list form, unfolded
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Key:
  """What runs must have in common to share a program."""

  model: config.ModelConfig
  optim: config.OptimConfig
  batch_size: int
  seq_len: int


def key_of(spec: plan.RunSpec) -> Key:
  """The program of a run; ValueError for what cannot be data."""
  optim = spec.optim
  if optim.mup and optim.decay_coupling == "independent" and optim.weight_decay:
    raise ValueError(
      "optim.decay_coupling: found 'independent' with a weight decay, expected 'lr' in a tunnel run"
    )
  shared = dataclasses.replace(optim, peak_lr=1.0, schedule=config.ScheduleConfig(), mup=False)
  model = knobs_lib.plain_model(spec.model)
  if model.max_position < spec.seq_len:
    raise ValueError(
      f"seq_len: found {spec.seq_len}, expected at most model.max_position {model.max_position}"
    )
  return Key(model, shared, spec.batch_size, spec.seq_len)


class Program:
  """The compiled functions of one key; see the module docstring for the two forms."""

  def __init__(self, key: Key, batching: Literal["loop", "vmap"]):
    self.key, self.batching = key, batching
    self.model = knobs_lib.graph_model(key.model)
    draw = functools.partial(knobs_lib.draw_params, key.model)
    shapes = jax.eval_shape(draw, jax.random.key(0))
    self.optimizer = build.make_optimizer(key.optim, key.model, shapes)
    self.state_shapes = State(
      jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(self.optimizer.init, shapes)
    )
    self._draw = jax.jit(draw)
    self.advance = jax.jit(self._over_runs(self._advance, (0, 0, 0, 0, None)), donate_argnums=1)
    self.row_nats = jax.jit(self._over_runs(self._row_nats, (0, 0, None, None), is_scoring=True))
    self.gradient = jax.jit(self._gradient)

  def init(self, spec: plan.RunSpec) -> State:
    """The state of step 0, without a run axis."""
    params = knobs_lib.scale_params(spec.model, self._draw(rng.key(spec.seed, "init")))
    return State(jnp.int32(0), params, self.optimizer.init(params))

  def _over_runs(self, fn: Callable, axes: tuple, *, is_scoring: bool = False) -> Callable:
    """`fn` of one run as a function of stacked runs; `advance` has the tokens in front."""
    rest = axes if is_scoring else (None, *axes)
    if self.batching == "vmap":
      return jax.vmap(fn, in_axes=rest)

    def one(*args):
      first = [
        a if axis is None else jax.tree.map(lambda x: x[0], a)
        for a, axis in zip(args, rest, strict=True)
      ]
      return jax.tree.map(lambda x: x[None], fn(*first))

    return one

  # --- Of one run --------------------------------------------------------------------------------

  def _nats(self, params: types.Params, knobs: knobs_lib.Knobs, ids_BT, mask_BT):
    """Sum of the masked nats of rows."""
    folded = knobs_lib.fold(params, knobs)
    hidden_BTD = self.model.apply({"params": folded}, ids_BT[:, :-1], return_logits=False).hidden
    nats, _, _ = fused_ce.fused_cross_entropy(
      hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
      transformer.head_weight(self.model.cfg, folded).astype(hidden_BTD.dtype),
      ids_BT[:, 1:].reshape(-1),
      mask_BT.reshape(-1),
      vocab_size=self.key.model.vocab_size,
    )
    return nats

  def _step(self, state: State, ids_BT, knobs: knobs_lib.Knobs, schedule) -> tuple[State, Any]:
    """Update number n = step + 1 uses learning_rate(n), as in `train.step`."""
    mask_BT = jnp.ones((ids_BT.shape[0], ids_BT.shape[1] - 1), jnp.float32)

    def loss_of(params):
      return self._nats(params, knobs, ids_BT, mask_BT) / mask_BT.size

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    lr = schedules.learning_rate(state.step + 1, schedule)
    updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params, lr=lr)
    updates = knobs_lib.scale_updates(updates, knobs)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss

  def _advance(self, tokens, state: State, starts_CB, knobs, schedule, count):
    """`count` <= C steps; (state, train loss of every step [C], 0 after the last)."""
    window = jnp.arange(self.key.seq_len + 1)[None]

    def body(i, carry):
      state, losses_C = carry
      state, loss = self._step(state, tokens[starts_CB[i][:, None] + window], knobs, schedule)
      return state, losses_C.at[i].set(loss)

    losses_C = jnp.zeros(starts_CB.shape[0], jnp.float32)
    return jax.lax.fori_loop(0, count, body, (state, losses_C))

  def _row_nats(self, params, knobs, ids_ET, mask_ET):
    """Masked nats of every row [E], `batch_size` rows at a time."""
    folded = knobs_lib.fold(params, knobs)
    E, rows = ids_ET.shape[0], min(self.key.batch_size, ids_ET.shape[0])
    parts = -(-E // rows)

    def split(x_ET):
      x_ET = jnp.pad(x_ET, ((0, parts * rows - E), (0, 0)))
      return x_ET.reshape(parts, rows, -1)

    def score(batch):
      ids_BT, mask_BT = batch
      logits_BTV = self.model.apply({"params": folded}, ids_BT[:, :-1]).logits
      logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
      logp_BT = jnp.take_along_axis(logp_BTV, ids_BT[:, 1:, None], axis=-1)[..., 0]
      return -jnp.sum(logp_BT * mask_BT, axis=1)

    return jax.lax.map(score, (split(ids_ET), split(mask_ET))).reshape(-1)[:E]

  def _gradient(self, params, knobs, ids_BT):
    """Gradient of the mean loss on fixed rows, for `optim.probe`; no run axis."""
    mask_BT = jnp.ones((ids_BT.shape[0], ids_BT.shape[1] - 1), jnp.float32)
    return jax.grad(lambda p: self._nats(p, knobs, ids_BT, mask_BT) / mask_BT.size)(params)


def stack(trees: list[Any]) -> Any:
  """Runs side by side: leaves [R, ...]."""
  return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees)


def unstack(tree: Any, index: int) -> Any:
  return jax.tree.map(lambda x: x[index], tree)


def batching_of(name: Batching) -> Literal["loop", "vmap"]:
  """auto: loop on a CPU, vmap elsewhere."""
  if name not in get_args(Batching):
    raise ValueError(f"batching: found {name!r}, expected one of {get_args(Batching)}")
  if name != "auto":
    return name
  return "loop" if jax.default_backend() == "cpu" else "vmap"
