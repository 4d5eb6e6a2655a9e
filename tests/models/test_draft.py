"""Draft blocks against the equations of inference.md section 10, written out in numpy float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.models import draft as draft_lib
from tests.models import common

KINDS = ("eagle", "minicpm", "eagle3")


EXTEND = jax.jit(draft_lib.extend, static_argnums=0)


def make(kind, seed=0, **changes):
  """(config, params, target config) of a tiny draft with norm scales that are not all 1."""
  target = common.config(scan_layers=False, num_layers=3)
  if kind == "eagle":
    changes = {"fc_bias": True} | changes
  if kind == "eagle3":
    changes = {"draft_vocab_size": 40} | changes
  cfg = draft_lib.for_target(target, kind, **changes)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    return jnp.asarray(path.endswith("scale") + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

  return cfg, trees.map_with_path(draw, draft_lib.abstract_params(cfg)[0]), target


def inputs(cfg, T, B=1, seed=1):
  rng = np.random.default_rng(seed)
  e = rng.normal(size=(B, T, cfg.layer.model_dim)).astype(np.float32)
  f = rng.normal(size=(B, T, cfg.feature_dim)).astype(np.float32)
  return jnp.asarray(e), jnp.asarray(f)


def rms(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def rotate(x_TNH, positions, theta):
  half = x_TNH.shape[-1] // 2
  angles = positions[:, None] * theta ** -(np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = x_TNH[..., :half], x_TNH[..., half:]
  return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def reference(cfg, params, e, f, window=0):
  """Features and logits input of one sequence, by the table of section 10."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  e, f = np.asarray(e, np.float64), np.asarray(f, np.float64)
  m, eps, s = cfg.layer, cfg.layer.norm_eps, cfg.residual_scale
  layer = p["layers_0"]
  if cfg.kind == "eagle":
    x = np.concatenate((e, f), -1) @ p["fc"]["kernel"] + p["fc"]["bias"]
    inner = x
  elif cfg.kind == "minicpm":
    e, f = rms(e, p["embed_norm"]["scale"], eps), rms(f, p["hidden_norm"]["scale"], eps)
    x = np.concatenate((e, f), -1) @ p["fc"]["kernel"]
    inner = rms(x, layer["attn_norm"]["scale"], eps)
  else:
    x = (cfg.feature_scale * f) @ p["fc"]["kernel"]
    e, h = rms(e, p["embed_norm"]["scale"], eps), rms(x, p["hidden_norm"]["scale"], eps)
    inner = np.concatenate((e, h), -1)
  T, group = x.shape[0], m.num_heads // m.num_kv_heads
  at = np.arange(T)
  q = rotate(np.einsum("td,dnh->tnh", inner, layer["attn"]["q"]["kernel"]), at, m.rope.theta)
  k = rotate(np.einsum("td,dnh->tnh", inner, layer["attn"]["k"]["kernel"]), at, m.rope.theta)
  v = np.einsum("td,dnh->tnh", inner, layer["attn"]["v"]["kernel"])
  out = np.zeros_like(q)
  for t in range(T):
    first = max(0, t - window + 1) if window else 0
    for n in range(m.num_heads):
      score = k[first : t + 1, n // group] @ q[t, n] / math.sqrt(m.head_dim)
      weight = np.exp(score - score.max())
      out[t, n] = weight @ v[first : t + 1, n // group] / weight.sum()
  x = x + s * np.einsum("tnh,nhd->td", out, layer["attn"]["o"]["kernel"])
  h = rms(x, layer["mlp_norm"]["scale"], eps)
  gate, up = (h @ layer["mlp"][name]["kernel"] for name in ("gate", "up"))
  return x + s * ((gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"])


def run(cfg, params, e, f, capacity=0, chunks=None, is_linear=False):
  """Outputs of all rows, committed in chunks."""
  B, T = e.shape[:2]
  shape = dataclasses.replace(cfg, window_size=0) if is_linear else cfg
  cache, start, outs = draft_lib.init_cache(shape, B, capacity or T), 0, []
  for size in chunks or [T]:
    at = slice(start, start + size)
    positions = jnp.broadcast_to(jnp.arange(start, start + size), (B, size))
    valid = jnp.ones((B, size), bool)
    out, cache = EXTEND(cfg, params, cache, e[:, at], f[:, at], positions, valid)
    outs.append(out)
    start += size
  return jnp.concatenate(outs, 1), cache


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_draft_equals_its_equation(kind, window):
  cfg, params, _ = make(kind, window_size=window)
  e, f = inputs(cfg, 7)
  found, _ = run(cfg, params, e, f)
  expected = reference(cfg, params, e[0], f[0], window)
  np.testing.assert_allclose(found[0], expected, atol=2e-5, rtol=2e-5)


def test_scales_are_those_of_the_table():
  target = common.config(num_layers=3)
  eagle, mini, eagle3 = (draft_lib.for_target(target, kind) for kind in KINDS)
  assert eagle.residual_scale == 1.0
  assert math.isclose(mini.residual_scale, 1.4 / math.sqrt(4))
  assert math.isclose(eagle3.residual_scale, 1.4 / math.sqrt(4))
  assert math.isclose(eagle3.feature_scale, 1.4 / math.sqrt(3))
  plain = draft_lib.plain(eagle3)
  assert (plain.feature_scale, plain.residual_scale) == (1.0, 1.0)
  assert draft_lib.feature_layers(32) == (2, 16, 29)
  assert config.DraftConfig(kind="minicpm", layer=mini.layer).draft_logit_scale == 1.0


def test_cpm_cu_scales_equal_plain_up_to_the_ratio_of_two_factors():
  """The final norm removes a common factor: features times a, branches times b is plain in b/a."""
  cfg, params, _ = make("eagle3")
  cfg = dataclasses.replace(cfg, feature_scale=0.25, residual_scale=0.25)
  e, f = inputs(cfg, 5)
  one, _ = run(cfg, params, e, f)
  two, _ = run(draft_lib.plain(cfg), params, e, f)
  # hidden_norm is invariant up to its epsilon, so the whole stream is scaled by 0.25.
  np.testing.assert_allclose(one, 0.25 * two, atol=2e-3)
  logits = [
    draft_lib.DraftModel(cfg).apply({"params": params}, x, method="logits") for x in (one, two)
  ]
  np.testing.assert_allclose(logits[0], logits[1], atol=5e-3)


def test_logits_scale_and_own_head():
  cfg, params, _ = make("minicpm", draft_logit_scale=0.25)
  hidden, head = jnp.ones((1, 2, 32)), jnp.asarray(np.random.default_rng(0).normal(size=(32, 5)))
  found = draft_lib.DraftModel(cfg).apply({"params": params}, hidden, head, method="logits")
  np.testing.assert_allclose(found, 0.25 * np.asarray(hidden @ head), atol=1e-5)
  with pytest.raises(ValueError, match="head_DR: found None"):
    draft_lib.DraftModel(cfg).apply({"params": params}, hidden, method="logits")
  cfg, params, _ = make("eagle3")
  found = draft_lib.DraftModel(cfg).apply({"params": params}, hidden, method="logits")
  x = rms(np.ones((2, 32)), np.asarray(params["norm"]["scale"]), cfg.layer.norm_eps)
  np.testing.assert_allclose(found[0], x @ np.asarray(params["lm_head"]["kernel"]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_one_pass_and_invalid_rows_leave_no_trace(kind):
  cfg, params, _ = make(kind)
  e, f = inputs(cfg, 12, B=2)
  whole, cache = run(cfg, params, e, f, capacity=16)
  parts, again = run(cfg, params, e, f, capacity=16, chunks=[5, 1, 6])
  np.testing.assert_allclose(parts, whole, atol=1e-5)
  common.assert_trees_close(again, cache, atol=1e-5)
  # 12 rows whose last ones are garbage, more in the second sequence: commit, then go on.
  num_valid = np.array([9, 7])
  valid = jnp.asarray(np.arange(12)[None] < num_valid[:, None])
  noisy_e = jnp.where(valid[..., None], e, 1e3)
  noisy_f = jnp.where(valid[..., None], f, -1e3)
  empty = draft_lib.init_cache(cfg, 2, 16)
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
  found, part = EXTEND(cfg, params, empty, noisy_e, noisy_f, positions, valid)
  np.testing.assert_allclose(found[0, :9], whole[0, :9], atol=1e-5)
  take = num_valid[:, None] + np.arange(3)
  rows = np.arange(2)[:, None]
  args = (e[rows, take], f[rows, take], jnp.asarray(take), jnp.ones((2, 3), bool))
  found, _ = EXTEND(cfg, params, part, *args)
  np.testing.assert_allclose(found, whole[rows, take], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_window_as_wide_as_the_text_is_full_and_a_ring_is_a_linear_cache(kind):
  cfg, params, _ = make(kind)
  e, f = inputs(cfg, 20)
  full, _ = run(cfg, params, e, f)
  wide, _ = run(dataclasses.replace(cfg, window_size=20), params, e, f, chunks=[8, 12])
  np.testing.assert_allclose(wide, full, atol=1e-5)
  narrow = dataclasses.replace(cfg, window_size=5)
  chunks = [7, 1, 1, 2, 9]
  linear, _ = run(narrow, params, e, f, chunks=chunks, is_linear=True)
  ring, cache = run(narrow, params, e, f, capacity=20, chunks=chunks)
  assert cache.positions_BR.shape == (1, 5)
  np.testing.assert_allclose(ring, linear, atol=1e-5)
  assert np.max(np.abs(linear - full)) > 1e-3  # the window is felt


def test_leftovers_of_a_longer_text_are_not_seen():
  cfg, params, _ = make("minicpm")
  e, f = inputs(cfg, 12)
  _, cache = run(cfg, params, e * 3, f * 2, capacity=16)
  expected, _ = run(cfg, params, e[:, :6], f[:, :6], capacity=16)
  positions, valid = jnp.arange(6)[None], jnp.ones((1, 6), bool)
  found, cache = EXTEND(cfg, params, cache, e[:, :6], f[:, :6], positions, valid)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"fc_bias": True}, "draft.fc_bias"),
    ({"window_size": -1}, "draft.window_size"),
    ({"feature_layers": (1, 2)}, "draft.feature_layers"),
    ({"draft_vocab_size": 10}, "draft.draft_vocab_size"),
    ({"residual_scale": 0.0}, "draft.residual_scale"),
  ],
)
def test_config_refuses(changes, match):
  fields = {"kind": "minicpm", "layer": make("minicpm")[0].layer}
  with pytest.raises(ValueError, match=match):
    config.DraftConfig(**fields | changes)


def test_a_draft_of_another_width_is_refused():
  cfg, _, target = make("eagle3")
  draft_lib.check_fits(cfg, target)
  with pytest.raises(ValueError, match="draft.layer.vocab_size: found 256, expected the target's"):
    draft_lib.check_fits(cfg, dataclasses.replace(target, vocab_size=300))
  with pytest.raises(ValueError, match="feature_layers"):
    draft_lib.check_fits(cfg, dataclasses.replace(target, num_layers=1))
