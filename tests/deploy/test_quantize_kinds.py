"""Experts and latent attention: Hessians from a float64 calculation of routing and norms."""

import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt
from minicpm_jax.deploy import blocks, quantize
from minicpm_jax.quant import gptq, qtensor
from tests.models import common
from tests.quant import gptq_oracle as oracle

SOLVER = gptq.GPTQConfig(group_size=8, scale_dtype="f16")


def batches(num=2, shape=(4, 24), seed=0):
  rng = np.random.default_rng(seed)
  rows = [rng.integers(0, 256, shape).astype(np.int32) for _ in range(num)]
  return [(tokens, np.ones_like(tokens)) for tokens in rows]


def run(model, params, method, calibration, **more):
  cfg = quantize.QuantizeConfig(method=method, solver=SOLVER, **more)
  return quantize.quantize_model(model, params, calibration, cfg)


def check_codes(found, w_IO, x_MI):
  """The leaf's codes are the oracle's for inputs x."""
  codes, *_ = oracle.gptq(w_IO.T, x_MI.T @ x_MI, g=8)
  mine = np.asarray(found.codes, np.int32).reshape(w_IO.shape) + 8
  assert np.mean(mine.T == codes) > 0.93  # float16 scales move a few codes


@pytest.mark.slow
def test_experts_see_the_tokens_that_the_router_gives_them():
  model, params = common.build(common.config("minicpm_moe_8x2b", num_layers=1))
  calibration = batches()
  done = run(model, params, "gptq", calibration)
  layer = blocks.layer_params(model.cfg, params, 0)
  half = {**layer, "attn": blocks.layer_params(model.cfg, done.params, 0)["attn"]}
  rows = []
  for tokens, segments in calibration:
    x = blocks.embed(model, params, tokens)
    seen = blocks.run(model.cfg, half, x, jnp.asarray(segments))[1]
    rows.append(np.asarray(seen["moe"][0], np.float64).reshape(-1, model.cfg.model_dim))
  x_MD = np.concatenate(rows)
  moe = {k: np.asarray(v["kernel"], np.float64) for k, v in layer["moe"].items()}
  chosen = np.argsort(-(x_MD @ moe["router"]), axis=-1)[:, : model.cfg.moe.experts_per_token]
  leaves = done.params["layers"]["moe"]
  for e in (0, 3):
    own = x_MD[np.any(chosen == e, axis=1)]
    assert 0 < len(own) < len(x_MD)
    one = {
      name: qtensor.QTensor(
        leaves[name]["kernel"].codes[0, e],
        leaves[name]["kernel"].scale[0, e],
        scheme="int4",
        group_size=8,
        shape=leaves[name]["kernel"].shape,
      )
      for name in ("gate", "up", "down")
    }
    check_codes(one["up"], moe["up"][e], own)
    gate, up = (own @ np.asarray(qtensor.dequantize(one[n]), np.float64) for n in ("gate", "up"))
    check_codes(one["down"], moe["down"][e], gate / (1 + np.exp(-gate)) * up)
  row = next(r for r in done.report if r["name"] == "moe/down")
  assert len(row["errors"]) == model.cfg.moe.num_experts and row["shape"][0] == len(row["errors"])


def test_an_expert_without_tokens_is_rounded():
  """All router logits 0: the first experts take every token, the others have the codes of RTN."""
  model, params = common.build(common.config("minicpm_moe_8x2b", num_layers=1))
  router = params["layers"]["moe"]["router"]
  router["kernel"] = jnp.zeros_like(router["kernel"])
  done = run(model, params, "gptq", batches())
  nearest = run(model, params, "rtn", [])
  a, b = (m.params["layers"]["moe"]["up"]["kernel"].codes[0] for m in (done, nearest))
  same = [
    np.mean(np.asarray(x, np.int8) == np.asarray(y, np.int8)) for x, y in zip(a, b, strict=True)
  ]
  busy = model.cfg.moe.experts_per_token
  assert all(s == 1.0 for s in same[busy:]) and all(s < 1.0 for s in same[:busy])


def test_latent_attention():
  """kv_b's inputs are the normalised latents of the quantised kv_a, in float64."""
  model, params = common.build(common.config("minicpm3_4b", num_layers=1))
  cfg, calibration = model.cfg, batches()
  done = run(model, params, "gptq", calibration)
  layer, quantised = (blocks.layer_params(cfg, p, 0) for p in (params, done.params))

  def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)

  table = np.asarray(params["embed"]["embedding"], np.float64) * cfg.scale_emb
  x_MD = np.concatenate([table[tokens].reshape(-1, cfg.model_dim) for tokens, _ in calibration])
  x_MD = norm(x_MD, layer["attn_norm"]["scale"], cfg.norm_eps)
  check_codes(
    quantised["attn"]["kv_a"]["kernel"], np.asarray(layer["attn"]["kv_a"]["kernel"]), x_MD
  )
  kv_a = np.asarray(qtensor.dequantize(quantised["attn"]["kv_a"]["kernel"]), np.float64)
  latent = (x_MD @ kv_a)[:, : cfg.mla.kv_lora_rank]
  latent = norm(latent, layer["attn"]["kv_a_norm"]["scale"], cfg.mla.latent_norm_eps)
  kv_b = np.asarray(layer["attn"]["kv_b"]["kernel"])
  check_codes(quantised["attn"]["kv_b"]["kernel"], kv_b.reshape(kv_b.shape[0], -1), latent)


@pytest.mark.parametrize("name", ["minicpm_moe_8x2b", "minicpm3_4b"])
def test_gptq_beats_rtn_and_goes_through_a_folder(tmp_path, name):
  model, params = common.build(common.config(name, num_layers=1))
  tokens = common.tokens((2, 24), seed=5)
  wanted = np.asarray(common.apply(model, params, tokens).logits)
  errors = {}
  for method in ("rtn", "gptq"):
    done = run(model, params, method, batches(8) if method == "gptq" else [])
    logits = np.asarray(common.apply(model, done.params, tokens).logits)
    errors[method] = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
  assert errors["gptq"] < errors["rtn"] < 0.6, errors
  ckpt.save_gptq(tmp_path / "m", model, done.params)
  loaded, back, _ = ckpt.load_hf(tmp_path / "m")
  found = common.apply(loaded, back, tokens).logits
  np.testing.assert_allclose(found, logits, atol=1e-4)


def smoothed(name):
  """(config, layer, smoothed layer, ratios, rows of what the blocks' parts read, float64)."""
  model, params = common.build(common.config(name, num_layers=1))
  cfg = quantize.QuantizeConfig(method="s-gptq", solver=SOLVER, awq_ratios=4)
  text = batches(1)
  hidden = [np.asarray(blocks.embed(model, params, tokens)) for tokens, _ in text]
  layer = blocks.layer_params(model.cfg, params, 0)
  folded, ratios = quantize._Work(model.cfg, cfg, text).smooth(layer, hidden)
  args = (jnp.asarray(hidden[0]), jnp.asarray(text[0][1]))
  before, seen = blocks.run(model.cfg, layer, *args)
  np.testing.assert_allclose(blocks.output(model.cfg, folded, *args), before, rtol=1e-4, atol=2e-5)
  return model.cfg, layer, folded, ratios, seen


def factor(x_MI, ratio):
  t = np.maximum(np.abs(np.asarray(x_MI, np.float64)).mean(0) ** ratio, 1e-4)
  return t / np.sqrt(t.max() * t.min())


def rounded(w_IO, t_I, group=8):
  """Q(w t) / t on GPTQ's symmetric grid, scales in float16."""
  w = (w_IO * t_I[:, None]).reshape(-1, group, w_IO.shape[1])
  s = (2 * np.abs(w).max(1, keepdims=True) / 15).astype(np.float16).astype(np.float64)
  return (np.clip(np.rint(w / s), -8, 7) * s).reshape(w_IO.shape) / t_I[:, None]


def test_smoothing_of_experts():
  """The router is multiplied with them; each expert's factor is the best for its own tokens."""
  cfg, layer, folded, ratios, seen = smoothed("minicpm_moe_8x2b")
  x_MD = np.asarray(seen["moe"][0], np.float64).reshape(-1, cfg.model_dim)
  t_D = factor(x_MD, ratios["moe/gate"])
  for name, axis in (("router", 0), ("gate", 1)):
    found = np.asarray(folded["moe"][name]["kernel"]) / np.asarray(layer["moe"][name]["kernel"])
    other = tuple(i for i in range(found.ndim) if i != axis)
    np.testing.assert_allclose(found.mean(other), t_D, rtol=1e-4)
  norm = np.asarray(layer["mlp_norm"]["scale"]) / np.asarray(folded["mlp_norm"]["scale"])
  np.testing.assert_allclose(norm, t_D, rtol=1e-4)
  moe = {k: np.asarray(v["kernel"], np.float64) for k, v in layer["moe"].items()}
  chosen = np.argsort(-(x_MD @ moe["router"]), axis=-1)[:, : cfg.moe.experts_per_token]
  for e, ratio in enumerate(ratios["moe/down"]):
    own = x_MD[np.any(chosen == e, axis=1)]
    gate, up, down = own @ moe["gate"][e], own @ moe["up"][e], moe["down"][e]
    inner = gate / (1 + np.exp(-gate)) * up
    losses = [
      np.square(inner @ (rounded(down, factor(inner, i / 4)) - down)).sum() for i in range(4)
    ]
    assert losses[int(4 * ratio)] <= 1.001 * min(losses)
    found = np.asarray(folded["moe"]["down"]["kernel"])[e] / down
    np.testing.assert_allclose(found.mean(1), factor(inner, ratio), rtol=1e-3)
  assert max(ratios["moe/down"]) > 0 and len(ratios) == 4
  # MiniCPM-MoE is multi-head: v -> o too, whose input is the attention's heads.
  y = np.asarray(seen["attn/o"][0], np.float64).reshape(len(x_MD), -1)
  o = np.asarray(layer["attn"]["o"]["kernel"], np.float64).reshape(y.shape[1], -1)
  losses = [np.square(y @ (rounded(o, factor(y, i / 4)) - o)).sum() for i in range(4)]
  assert losses[int(4 * ratios["attn/o"])] <= 1.001 * min(losses) and ratios["attn/o"] > 0
  t_NH = factor(y, ratios["attn/o"]).reshape(layer["attn"]["o"]["kernel"].shape[:2])
  found = np.asarray(folded["attn"]["o"]["kernel"]) / np.asarray(layer["attn"]["o"]["kernel"])
  np.testing.assert_allclose(found.mean(2), t_NH, rtol=1e-4)
  t_D = np.asarray(layer["attn_norm"]["scale"]) / np.asarray(folded["attn_norm"]["scale"])
  v, changed = (np.asarray(one["attn"]["v"]["kernel"]) for one in (layer, folded))
  np.testing.assert_allclose(v * t_D[:, None, None] / t_NH, changed, rtol=1e-3, atol=1e-6)


def test_smoothing_of_latent_attention():
  """q_b and kv_b behind the latent norms: norm / t, rows * t, t from what the kernels read."""
  _, layer, folded, ratios, seen = smoothed("minicpm3_4b")
  assert set(ratios) == {"attn/q_a", "attn/q_b", "attn/kv_b", "mlp/gate", "mlp/down"}
  assert max(ratios[name] for name in ("attn/q_a", "attn/q_b", "attn/kv_b")) > 0
  for norm, name in (("q_a_norm", "q_b"), ("kv_a_norm", "kv_b")):
    x = np.asarray(seen[f"attn/{name}"][0])
    t_I = factor(x.reshape(-1, x.shape[-1]), ratios[f"attn/{name}"])
    attn, new = layer["attn"], folded["attn"]
    found = np.asarray(new[name]["kernel"]) / np.asarray(attn[name]["kernel"])
    np.testing.assert_allclose(found.mean((1, 2)), t_I, rtol=1e-4)
    np.testing.assert_allclose(
      np.asarray(attn[norm]["scale"]) / np.asarray(new[norm]["scale"]), t_I, rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minicpm_moe_8x2b", "minicpm3_4b"])
def test_smoothed_kinds_are_quantised(name):
  model, params = common.build(common.config(name, num_layers=1))
  tokens = common.tokens((2, 24), seed=5)
  wanted = np.asarray(common.apply(model, params, tokens).logits)
  done = run(model, params, "s-p-gptq", batches(4), awq_ratios=3)
  logits = np.asarray(common.apply(model, done.params, tokens).logits)
  assert np.linalg.norm(logits - wanted) < 0.5 * np.linalg.norm(wanted)
  assert all("awq_ratio" in r for r in done.report if r["name"].endswith(("gate", "down")))
