"""Dense attention against loops in float64, gradients against the plain form."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash import api, xla

CONFIGS = {
  "blocks": xla.XlaConfig(block_q=4),
  "bands": xla.XlaConfig(block_q=3, max_bands=2),
}


def loop_attention(q, k, v, *, scale, q_offset=0, kv_length=None, q_ids=None, kv_ids=None):
  """softmax over the visible keys of each query, one at a time, float64."""
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  out = np.zeros((B, T, N, v.shape[-1]))
  offset = np.broadcast_to(q_offset, (B,))
  length = np.broadcast_to(S if kv_length is None else kv_length, (B,))
  for b in range(B):
    for t in range(T):
      slots = [s for s in range(S) if s <= t + offset[b] and s < length[b]]
      if q_ids is not None:
        slots = [s for s in slots if q_ids[b, t] == kv_ids[b, s] != 0]
      for n in range(N if slots else 0):
        head = n // (N // K)
        scores = scale * (k[b, slots, head].astype(np.float64) @ q[b, t, n])
        probs = np.exp(scores - scores.max())
        out[b, t, n] = probs @ v[b, slots, head] / probs.sum()
  return out


def arrays(B, T, S, N, K, H, V, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, V)]
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


CASES = {
  "causal": (dict(B=2, T=13, S=13, N=4, K=2, H=8, V=8), {}),
  "mla_widths": (dict(B=1, T=9, S=9, N=2, K=2, H=12, V=4), {}),
  "offset": (dict(B=2, T=6, S=17, N=4, K=1, H=8, V=8), {"q_offset": 5}),
  "traced_offset": (dict(B=2, T=6, S=17, N=4, K=2, H=8, V=8), {"q_offset": np.array([3, 11])}),
  "length": (
    dict(B=2, T=6, S=17, N=4, K=2, H=8, V=8),
    {"q_offset": 11, "kv_length": np.array([9, 17])},
  ),
  "decode": (dict(B=3, T=1, S=16, N=4, K=2, H=8, V=8), {"q_offset": np.array([0, 7, 15])}),
  "packed": (
    dict(B=2, T=12, S=12, N=4, K=2, H=8, V=8),
    {"ids": np.array([[0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [1] * 6 + [2] * 5 + [0]])},
  ),
}


def keywords(extra):
  """(arguments of api.flash_attention, arguments of loop_attention)."""
  extra = dict(extra)
  ids = extra.pop("ids", None)
  theirs = dict(extra)
  if ids is not None:
    extra |= {
      "q_segment_ids_BT": jnp.asarray(ids, jnp.int32),
      "kv_segment_ids_BS": jnp.asarray(ids, jnp.int32),
    }
    theirs |= {"q_ids": ids, "kv_ids": ids}
  return extra, theirs


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["ref", *CONFIGS])
def test_forward_is_the_equation(case, implementation):
  shape, extra = CASES[case]
  q, k, v = arrays(**shape)
  ours, theirs = keywords(extra)
  if implementation != "ref":
    ours |= {"implementation": "xla", "config": CONFIGS[implementation]}
  else:
    ours |= {"implementation": "ref"}
  out = api.flash_attention(q, k, v, scale=0.3, **ours)
  expected = loop_attention(*map(np.asarray, (q, k, v)), scale=0.3, **theirs)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", ["causal", "mla_widths", "length", "packed"])
def test_gradient_is_that_of_the_plain_form(case, config):
  shape, extra = CASES[case]
  q, k, v = arrays(**shape)
  ours, _ = keywords(extra)

  def gradients(**how):
    out, vjp = jax.vjp(lambda *qkv: api.flash_attention(*qkv, **ours, **how), q, k, v)
    return vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

  expected = jax.jit(lambda: gradients(implementation="ref"))()
  found = jax.jit(lambda: gradients(implementation="xla", config=CONFIGS[config]))()
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
  T=st.integers(1, 20),
  extra_keys=st.integers(0, 7),
  K=st.sampled_from([1, 2]),
  G=st.sampled_from([1, 3]),
  block_q=st.integers(1, 9),
  max_bands=st.integers(1, 4),
  seed=st.integers(0, 99),
)
def test_any_blocks_give_the_equation(T, extra_keys, K, G, block_q, max_bands, seed):
  q, k, v = arrays(1, T, T + extra_keys, K * G, K, 4, 4, seed=seed)
  ids = np.sort(np.random.default_rng(seed).integers(0, 4, size=(1, T + extra_keys)))
  q_ids = ids[:, extra_keys:]
  config = xla.XlaConfig(block_q=block_q, max_bands=max_bands)
  run = functools.partial(api.flash_attention, scale=0.5, q_offset=extra_keys)
  out = jax.jit(functools.partial(run, implementation="xla", config=config))(
    q, k, v, q_segment_ids_BT=jnp.asarray(q_ids), kv_segment_ids_BS=jnp.asarray(ids)
  )
  expected = loop_attention(
    *map(np.asarray, (q, k, v)), scale=0.5, q_offset=extra_keys, q_ids=q_ids, kv_ids=ids
  )
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_good_as_the_plain_form():
  q, k, v = arrays(1, 40, 40, 4, 2, 16, 16)
  exact = loop_attention(*map(np.asarray, (q, k, v)), scale=0.25)
  low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  error = {}
  for name in ("ref", "xla"):
    out = api.flash_attention(*low, implementation=name)
    assert out.dtype == jnp.bfloat16
    error[name] = np.abs(np.asarray(out, np.float64) - exact).max()
  assert error["xla"] <= 2 * error["ref"] + 1e-3


def test_default_blocks_and_sharded_batch_agree():
  """The automatic choice, on one device and with a batch split over eight."""
  q, k, v = arrays(8, 64, 64, 4, 2, 8, 8)
  expected = api.flash_attention(q, k, v, implementation="ref")
  np.testing.assert_allclose(jax.jit(api.flash_attention)(q, k, v), expected, atol=1e-5)
  mesh = jax.make_mesh((8,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, jax.P("dp"))
    compiled = jax.jit(api.flash_attention).lower(*(jax.device_put(x, rows) for x in (q, k, v)))
    compiled = compiled.compile()
    out = compiled(*(jax.device_put(x, rows) for x in (q, k, v)))
  assert "all-gather" not in compiled.as_text()
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_backend_says_why_it_cannot_serve():
  q, k, v = arrays(1, 4, 4, 2, 2, 8, 8)
  with pytest.raises(NotImplementedError, match="cudnn: the default backend is cpu"):
    api.flash_attention(q, k, v, implementation="cudnn")
  with pytest.raises(ValueError, match="block_q: found 0"):
    xla.XlaConfig(block_q=0)
