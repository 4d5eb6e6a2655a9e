"""AdamW against float64 numpy and against optax; freezing, dtypes, sharded state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.optim import build, mup

MODEL = config.ModelConfig(
  vocab_size=8,
  model_dim=12,
  mlp_dim=8,
  num_layers=2,
  num_heads=2,
  num_kv_heads=2,
  head_dim=4,
  max_position=8,
  dim_model_base=4,
)
SHAPES = {
  "embed/embedding": (8, 12),
  "layers/attn/q/kernel": (2, 12, 2, 4),
  "layers/attn_norm/scale": (2, 12),
  "final_norm/scale": (12,),
}
SCALE = {"embed/embedding": 1 / 3, "layers/attn/q/kernel": 1 / 3}  # w = 3; norms 1
NORMS = ("layers/attn_norm/scale", "final_norm/scale")


def draw(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {path: rng.normal(size=shape).astype(dtype) for path, shape in SHAPES.items()}


def tree(flat):
  return trees.unflatten({path: jnp.asarray(x) for path, x in flat.items()})


def run(cfg, lrs, params, dtype=jnp.float32):
  tx = build.make_optimizer(cfg, MODEL, params)
  state = tx.init(params)

  @jax.jit
  def step(params, state, grads, lr):
    updates, state = tx.update(grads, state, params, lr=lr)
    return optax.apply_updates(params, updates), state

  for i, lr in enumerate(lrs):
    grads = jax.tree.map(lambda g: (5 * g).astype(dtype), tree(draw(100 + i)))
    params, state = step(params, state, grads, lr)
  assert step._cache_size() == 1  # the learning rate is data
  return params, state


def adamw_by_hand(cfg, lrs, flat):
  """Loshchilov & Hutter's AdamW with a clipped global norm and muP factors, float64 loops."""
  p = {k: v.astype(np.float64) for k, v in flat.items()}
  m = {k: np.zeros_like(v) for k, v in p.items()}
  v = {k: np.zeros_like(x) for k, x in p.items()}
  for i, lr in enumerate(lrs):
    g = {k: 5 * x.astype(np.float64) for k, x in draw(100 + i).items()}
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    for k in p:
      gk = g[k] * min(1.0, cfg.clip_norm / norm) if cfg.clip_norm else g[k]
      m[k] = cfg.b1 * m[k] + (1 - cfg.b1) * gk
      v[k] = cfg.b2 * v[k] + (1 - cfg.b2) * gk**2
      u = (m[k] / (1 - cfg.b1 ** (i + 1))) / (np.sqrt(v[k] / (1 - cfg.b2 ** (i + 1))) + cfg.eps)
      wd = 0.0 if k in NORMS else cfg.weight_decay
      rate = lr * (SCALE.get(k, 1.0) if cfg.mup else 1.0)
      outside = cfg.decay_coupling == "independent"
      p[k] = p[k] - rate * (u + (0 if outside else wd * p[k])) - (wd * p[k] if outside else 0)
  return p


@pytest.mark.smoke
@pytest.mark.parametrize(
  "cfg",
  [
    config.OptimConfig(),
    config.OptimConfig(decay_coupling="independent", weight_decay=1e-3),
    config.OptimConfig(mup=False, clip_norm=0.0, eps=1e-15),
    config.OptimConfig(clip_norm=1e6, weight_decay=0.0),
  ],
  ids=["default", "independent", "no_mup_no_clip", "clip_not_reached"],
)
def test_updates_equal_adamw_in_float64(cfg):
  lrs = (0.0, 0.01, 0.02, 0.02, 0.005)
  got, _ = run(cfg, lrs, tree(draw(0)))
  want = adamw_by_hand(cfg, lrs, draw(0))
  for path, x in trees.flatten_paths(got).items():
    np.testing.assert_allclose(x, want[path], rtol=3e-6, atol=3e-7, err_msg=path)


def test_updates_equal_optax_adamw_by_groups():
  cfg, lr = config.OptimConfig(), 0.01
  params = tree(draw(0))
  groups = {
    name: optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=wd)
    for name, rate, wd in (("matrix", lr / 3, 0.1), ("norm", lr, 0.0))
  }
  labels = trees.map_with_path(lambda p, _: "norm" if p in NORMS else "matrix", params)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(groups, labels))
  state, want = tx.init(params), params
  for i in range(4):
    updates, state = tx.update(jax.tree.map(lambda g: 5 * g, tree(draw(100 + i))), state, want)
    want = optax.apply_updates(want, updates)
  got, _ = run(cfg, (lr,) * 4, params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_low_precision_parameters_keep_a_float32_second_moment():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(draw(0)))
  cfg = config.OptimConfig(moment_dtype="bf16")
  got, state = run(cfg, (0.01, 0.01), params, dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype(jnp.float32)}
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
  want = adamw_by_hand(cfg, (0.01, 0.01), draw(0))
  for path, x in trees.flatten_paths(got).items():
    np.testing.assert_allclose(np.asarray(x, np.float32), want[path], rtol=0.02, atol=0.02)


def test_frozen_leaves_do_not_move_have_no_moments_and_no_share_in_the_norm():
  params = tree(draw(0))
  cfg = config.OptimConfig(frozen=("^embed/", "final_norm"))
  got, state = run(cfg, (0.01, 0.01), params)
  np.testing.assert_array_equal(got["embed"]["embedding"], params["embed"]["embedding"])
  np.testing.assert_array_equal(got["final_norm"]["scale"], params["final_norm"]["scale"])
  assert trees.num_params(state) == 1 + 2 * (2 * 12 * 2 * 4 + 2 * 12)
  # The same draws with the trained leaves alone: a smaller global norm.
  alone = {"layers": params["layers"]}
  tx = build.make_optimizer(config.OptimConfig(), MODEL, alone)
  state = tx.init(alone)
  for i in range(2):
    grads = {"layers": jax.tree.map(lambda x: 5 * x, tree(draw(100 + i))["layers"])}
    updates, state = tx.update(grads, state, alone, lr=0.01)
    alone = optax.apply_updates(alone, updates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    got["layers"],
    alone["layers"],
  )


@pytest.mark.parametrize(
  "frozen, message", [(("lm_head",), "lm_head.*matches no parameter"), ((".",), "every parameter")]
)
def test_a_useless_freeze_is_refused(frozen, message):
  with pytest.raises(ValueError, match=message):
    build.make_optimizer(config.OptimConfig(frozen=frozen), MODEL, tree(draw(0)))


def test_an_unknown_leaf_is_refused_when_building():
  with pytest.raises(ValueError, match="layers/attn/q/weights"):
    build.make_optimizer(
      config.OptimConfig(), MODEL, {"layers": {"attn": {"q": {"weights": jnp.zeros(2)}}}}
    )


@pytest.mark.parametrize("frozen", [(), ("^embed/",)], ids=["all", "frozen"])
def test_sharded_state_and_update_equal_one_device(frozen):
  cfg, params = config.OptimConfig(frozen=frozen), tree(draw(0))
  mesh = mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=4, tp=2))
  names = {
    "embed/embedding": ("vocab", "embed"),
    "layers/attn/q/kernel": ("layers", "embed", "heads", "head_dim"),
    "layers/attn_norm/scale": ("layers", "embed"),
    "final_norm/scale": ("embed",),
  }
  place = mesh_lib.tree_shardings(mesh, trees.unflatten(names), params)
  tx = build.make_optimizer(cfg, MODEL, params)
  state_place = build.state_shardings(tx, params, place, mesh_lib.replicated(mesh))
  sharded = jax.device_put(params, place)
  state = jax.jit(tx.init, out_shardings=state_place)(sharded)
  moments = {path: x.sharding.spec for path, x in trees.flatten_paths(state).items() if x.ndim}
  assert len(moments) == 2 * (4 - len(frozen))
  for path, spec in moments.items():
    param = next(p for p in names if path.endswith(p))
    assert spec == mesh_lib.sharding(mesh, names[param]).spec, path
  grads = tree(draw(100))
  updates, _ = jax.jit(lambda g, s, p: tx.update(g, s, p, lr=0.01))(
    jax.device_put(grads, place), state, sharded
  )
  alone, _ = tx.update(grads, tx.init(params), params, lr=0.01)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), updates, alone)


def test_the_roles_of_the_test_tree_match_the_scales_written_above():
  assert {p: mup.role_of(p) for p in SHAPES} == {
    "embed/embedding": "embedding",
    "layers/attn/q/kernel": "matrix",
    **dict.fromkeys(NORMS, "norm"),
  }


def test_a_frozen_pattern_that_is_no_expression_is_named():
  with pytest.raises(ValueError, match=r"optim\.frozen: '\(' is no regular expression"):
    build.frozen_labels(("(",), {"embed": {"embedding": jnp.zeros(1)}})
