"""QTensor: values against equations in numpy, and its life as a parameter leaf."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import orbax_io
from minicpm_jax.config import MeshConfig, QuantConfig
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.models import convert, transformer
from minicpm_jax.nn import functional
from minicpm_jax.quant import leaf, qtensor, schemes, tree
from pallas_kernels.common import gpu, spec
from tests.models import common

RNG = np.random.default_rng(0)


def expected_values(w_KN, scheme, g):
  """W quantised and dequantised by the table of `schemes`, group by group in float32 numpy.

  The largest weight of a group of asym and int4 sits on a tie (1.5 or 7.5 scales): the last bit of
  the scale decides its code.
  """
  out = np.zeros(w_KN.shape)
  for n in range(w_KN.shape[1]):
    for k in range(0, w_KN.shape[0], g):
      group = w_KN[k : k + g, n]
      peak = np.abs(group).max()
      if scheme == "ternary":
        s = np.float32(np.abs(group).mean())
        v = np.clip(np.rint(group / s), -1, 1)
      elif scheme == "asym":
        s = peak / 1.5
        v = np.clip(np.rint(group / s), -2, 1)
      elif scheme == "half":
        s = peak / 1.5
        v = np.array([min((-1.5, -0.5, 0.5, 1.5), key=lambda c: abs(c - x)) for x in group / s])
      elif scheme == "sym":
        s = peak / 2
        v = np.array([min((-2, -1, 1, 2), key=lambda c: abs(c - x)) for x in group / s])
      elif scheme == "five":
        s = peak / 2
        v = np.clip(np.rint(group / s), -2, 2)
      elif scheme == "int4":
        s = peak / 7.5
        v = np.clip(np.rint(group / s), -8, 7)
      else:
        s = peak / 127
        v = np.rint(group / s)
      out[k : k + g, n] = s * v
  return out


@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
@pytest.mark.parametrize("g", [-1, 6])
def test_values_are_those_of_the_table(scheme, g):
  w_KN = RNG.normal(size=(24, 40)).astype(np.float32)
  expected = expected_values(w_KN, scheme, 24 if g == -1 else g)
  quantize = lambda w: qtensor.dequantize(qtensor.quantize(w, scheme, g))  # noqa: E731
  for call in (quantize, jax.jit(quantize)):  # XLA would multiply by 1/7.5, an ulp off
    np.testing.assert_allclose(call(jnp.asarray(w_KN)), expected, atol=1e-6)


@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
@pytest.mark.parametrize("rows", [24, 21])
def test_pack_and_unpack_give_the_same_bits(scheme, rows):
  w = jnp.asarray(RNG.normal(size=(2, rows, 3, 2)).astype(np.float32))
  qt = qtensor.quantize(w, scheme, num_lead=1)
  packed = qtensor.pack(qt)
  per_byte = 8 // schemes.get(scheme).bits
  assert packed.codes.dtype == jnp.uint8
  assert packed.codes.shape == (2, -(-rows // per_byte), 3, 2)
  np.testing.assert_array_equal(qtensor.unpack(packed).codes, qt.codes)
  np.testing.assert_array_equal(qtensor.dequantize(packed), qtensor.dequantize(qt))


def test_byte_order_of_packed_codes():
  codes = jnp.asarray([[-8], [7], [0], [1]])
  qt = qtensor.make(codes, jnp.ones((1, 1)), "int4", group_size=-1)
  np.testing.assert_array_equal(qtensor.pack(qt).codes, [[0 | 15 << 4], [8 | 9 << 4]])
  ternary = qtensor.make(
    jnp.asarray([[-1], [0], [1], [1]]), jnp.ones((1, 1)), "ternary", group_size=-1
  )
  np.testing.assert_array_equal(qtensor.pack(ternary).codes, [[0 | 1 << 2 | 2 << 4 | 2 << 6]])


def test_zero_points_and_group_index():
  codes = RNG.integers(-8, 8, (8, 3))
  scale, zero = RNG.random((2, 3)).astype(np.float32), RNG.integers(-8, 8, (2, 3))
  g_idx = np.array([0, 1, 1, 0, 0, 1, 0, 1])
  qt = qtensor.make(
    jnp.asarray(codes), jnp.asarray(scale), "int4", group_size=4, zero=zero, g_idx=g_idx
  )
  expected = scale[g_idx] * (codes - zero[g_idx])
  np.testing.assert_allclose(qtensor.dequantize(qt), expected, rtol=1e-6)
  x = RNG.normal(size=(2, 8)).astype(np.float32)
  np.testing.assert_allclose(qtensor.matmul(jnp.asarray(x), qt), x @ expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: qtensor.quantize(jnp.ones((6, 2)), "ternary", 4), "group_size: found 4"),
    (lambda: qtensor.quantize(jnp.ones((6, 2)), "int5"), "found 'int5'"),
    (lambda: qtensor.quantize(jnp.ones((0, 2))), "found 0 inputs"),
    (lambda: schemes.group_count(6, True), "group_size: found True"),
    (lambda: qtensor.quantize(jnp.ones((6, 2)), num_in=2), "num_in: found 2"),
    (
      lambda: qtensor.make(jnp.ones((6, 2)), jnp.ones((3, 2)), "int4", group_size=3),
      r"scale: found shape \(3, 2\), expected \(2, 2\)",
    ),
    (
      lambda: qtensor.make(jnp.full((4, 1), 9), jnp.ones((1, 1)), "int4", group_size=-1),
      r"codes: found codes 9..9, expected -8..7",
    ),
    (
      lambda: qtensor.unpack(
        qtensor.pack(qtensor.quantize(jnp.ones((6, 2)))).replace(shape=(9, 2))
      ),
      "expected packed uint8",
    ),
    (
      lambda: tree.quantize_params(
        QuantConfig(weights="codes"), {"mlp": {"up": {"kernel": jnp.full((4, 2), jnp.nan)}}}
      ),
      "mlp/up/kernel: found weights up to nan, expected finite",
    ),
    (lambda: QuantConfig(group_size=0), "quant.group_size: found 0"),
    (lambda: QuantConfig(include=("(",)), "quant.include"),
    (lambda: QuantConfig(group_size=64, scale_shards=2), "quant.scale_shards: found 2"),
    (
      lambda: tree.selected(QuantConfig(include=("nothing",)), {"a": {"kernel": jnp.ones(2)}}),
      "matches no parameter",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# --- A leaf of the model -------------------------------------------------------------------------

TOKENS = common.tokens((2, 12))


@pytest.fixture(scope="module")
def dense():
  return common.build(common.config("minicpm4_8b"))


@functools.partial(jax.jit, static_argnums=0)  # leaf by leaf it is hundreds of small programs
def quantize(cfg, params):
  return tree.quantize_params(cfg, params)


dequantize = jax.jit(tree.dequantize_params)


def with_quant(model, **kwargs):
  return transformer.Transformer(dataclasses.replace(model.cfg, quant=QuantConfig(**kwargs)))


@pytest.mark.parametrize("scheme, g, form", [("ternary", -1, "codes"), ("int4", 16, "packed")])
def test_model_with_qtensors_equals_the_dequantised_model(dense, form, scheme, g):
  model, params = dense
  cfg = QuantConfig(scheme=scheme, group_size=g, weights=form)
  quantized = quantize(cfg, params)
  expected = common.apply(model, dequantize(quantized), TOKENS).logits
  found = common.apply(
    with_quant(model, scheme=scheme, group_size=g, weights=form), quantized, TOKENS
  )
  np.testing.assert_allclose(found.logits, expected, atol=2e-5)
  # The list of layers, in a model whose config says nothing: the leaf decides.
  listed_cfg, listed = convert.unstack_layers(model.cfg, quantized)
  listed_logits = common.apply(transformer.Transformer(listed_cfg), listed, TOKENS).logits
  np.testing.assert_allclose(listed_logits, expected, atol=2e-5)
  _, again = convert.stack_layers(listed_cfg, listed)
  jax.tree.map(np.testing.assert_array_equal, again, quantized)


def test_latent_forward_is_the_dequantised_model_and_its_gradient_passes(dense):
  model, params = dense
  quant_cfg = QuantConfig(scheme="ternary", group_size=16)
  latent = with_quant(model, scheme="ternary", group_size=16)
  fused = tree.dequantize_params(
    tree.quantize_params(dataclasses.replace(quant_cfg, weights="codes"), params)
  )
  loss = lambda m: jax.jit(jax.value_and_grad(lambda p: common.mean_loss(m, p, TOKENS)))  # noqa: E731
  found, found_grads = loss(latent)(params)
  expected, expected_grads = loss(model)(fused)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  common.assert_trees_close(found_grads, expected_grads, atol=1e-6)


@pytest.mark.parametrize("name", ["minicpm3_4b", "minicpm_moe_8x2b"])
def test_latent_heads_and_experts(name):
  """Kernels that are not used through `linear`: kv_b of MLA, the experts."""
  model, params = common.build(common.config(name))
  cfg = QuantConfig(scheme="five", weights="packed")
  quantized = quantize(cfg, params)
  expected = common.apply(model, dequantize(quantized), TOKENS).logits
  both = jax.jit(
    lambda a, b: (
      model.apply({"params": a}, TOKENS).logits,
      with_quant(model, scheme="five").apply({"params": b}, TOKENS).logits,
    )
  )
  for found in both(quantized, params):
    np.testing.assert_allclose(found, expected, atol=2e-5)
  kinds = {p: qtensor.is_qtensor(x) for p, x in tree.selected(cfg, quantized).items()}
  assert all(kinds.values()) and not any("router" in path or "norm" in path for path in kinds)


def test_init_restore_shard_and_donate(dense, tmp_path):
  model, params = dense
  model = with_quant(model, scheme="int4", group_size=16, weights="packed")
  quantized = quantize(model.cfg.quant, params)
  shapes, specs = transformer.abstract_params(model)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), shapes, quantized)
  run = tmp_path / "run"
  orbax_io.import_params(run, model.cfg, quantized)
  mesh = mesh_lib.make_mesh(MeshConfig(tp=2, fsdp=2, dp=1), jax.devices()[:4])
  _, restored, _ = ckpt.load_run(run, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, restored, quantized)
  gate = restored["layers"]["mlp"]["gate"]["kernel"]
  assert gate.codes.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tp")
  assert gate.scale.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tp")
  expected = common.apply(model, quantized, TOKENS).logits
  with jax.set_mesh(mesh):
    found = common.apply(model, restored, TOKENS).logits
  np.testing.assert_allclose(jax.device_get(found), expected, atol=1e-5)
  scaled = jax.jit(
    lambda t: tree.map_qtensors(lambda q: q.replace(scale=2 * q.scale), t), donate_argnums=0
  )
  doubled = scaled(restored)
  assert gate.codes.is_deleted()
  again = doubled["layers"]["mlp"]["gate"]["kernel"]
  np.testing.assert_allclose(
    qtensor.dequantize(jax.device_get(again)),
    2 * qtensor.dequantize(quantized["layers"]["mlp"]["gate"]["kernel"]),
  )


@pytest.mark.parametrize("num_in, groups, packed_bytes", [(96, None, "tp"), (128, "tp", "tp")])
def test_groups_that_the_mesh_does_not_divide_are_on_every_device(num_in, groups, packed_bytes):
  """MiniCPM-2B's 5760 inputs in groups of 128 are 45 groups: tp = 2 cuts their codes alone."""
  qt = qtensor.pack(qtensor.quantize(jnp.ones((num_in, 64)), "int4", 32))
  labels, sizes = leaf.names(qt, ("mlp", "embed")), {"tp": 2, "fsdp": 2}
  spec = {
    name: mesh_lib.partition_spec(getattr(labels, name), sizes=sizes, shape=getattr(qt, name).shape)
    for name in ("codes", "scale")
  }
  assert spec["scale"] == jax.sharding.PartitionSpec(groups, "fsdp")
  assert spec["codes"] == jax.sharding.PartitionSpec(packed_bytes, "fsdp")
  few = leaf.names(qtensor.pack(qtensor.quantize(jnp.ones((6, 64)), "int4", 2)), ("mlp", "embed"))
  whole = mesh_lib.partition_spec(few.codes, sizes=sizes, shape=(3, 64))
  assert whole == jax.sharding.PartitionSpec(None, "fsdp")


def test_known_codes_may_meet_a_trace():
  """Codes closed over by a jitted function are checked and used; traced ones only used."""
  make = lambda codes: qtensor.make(codes, jnp.ones((1, 2)), "int4", group_size=-1)  # noqa: E731
  codes = jnp.arange(-8, 8).reshape(8, 2)
  beyond = codes + 1
  for found in (jax.jit(lambda: make(codes))(), jax.jit(make)(codes)):
    np.testing.assert_array_equal(found.codes.astype(jnp.int8), codes)
  with pytest.raises(ValueError, match="codes: found codes -7..8"):
    jax.jit(lambda: make(beyond))()
  scale = jnp.array([[1.0, jnp.nan]])
  with pytest.raises(ValueError, match="scale: found inf or nan"):
    jax.jit(lambda: qtensor.make(codes, scale, "int4", group_size=-1))()
  scale = jnp.ones((1, 2))
  found = jax.jit(lambda: qtensor.make(codes, scale, "int4", group_size=-1))()
  np.testing.assert_array_equal(found.scale, scale)


def test_initial_parameters_are_quantised_normals():
  cfg = common.config("minicpm4_8b", quant=QuantConfig(scheme="ternary", weights="codes"))
  params = transformer.init_params(transformer.Transformer(cfg), jax.random.key(0))
  q = params["layers"]["attn"]["q"]["kernel"]
  assert qtensor.is_qtensor(q) and q.codes.shape == (2, 32, cfg.num_heads, cfg.head_dim)
  assert abs(float(jnp.mean(q.codes == 0)) - 0.31) < 0.04


def test_export_to_hf_is_the_dequantised_model(dense, tmp_path):
  model, params = dense
  quantized = tree.quantize_params(QuantConfig(scheme="ternary", weights="packed"), params)
  ckpt.save_hf(tmp_path / "hf", model, quantized)
  loaded, again, _ = ckpt.load_hf(tmp_path / "hf")
  assert loaded.cfg.quant is None
  jax.tree.map(np.testing.assert_array_equal, again, tree.dequantize_params(quantized))


def test_fold_to_llama_scales_the_scales(dense):
  model, params = dense
  quantized = tree.quantize_params(QuantConfig(scheme="int4", weights="codes"), params)
  _, found = convert.fold_to_llama(model.cfg, quantized)
  _, expected = convert.fold_to_llama(model.cfg, tree.dequantize_params(quantized))
  common.assert_trees_close(tree.dequantize_params(found), expected, atol=1e-6)


def test_linear_in_bfloat16_multiplies_by_exact_codes():
  """y = (x @ T) s: the only rounding is of the float32 result, not of the scale."""
  w = jnp.asarray(RNG.normal(size=(64, 8)).astype(np.float32))
  qt = qtensor.quantize(w)
  x = jnp.asarray(RNG.integers(-4, 5, (3, 64)), jnp.bfloat16)
  exact = np.asarray(x, np.float64) @ np.asarray(qtensor.dequantize(qt), np.float64)
  found = np.asarray(functional.linear(x, qt), np.float64)
  np.testing.assert_allclose(found, exact, rtol=2**-8)


@pytest.mark.parametrize("scheme, g", [("ternary", -1), ("ternary", 16), ("int4", 16)])
def test_packed_kernels_are_multiplied_by_their_op(scheme, g, monkeypatch):
  """By the op of the scheme, as `auto` (the XLA form on a mesh with tp), with float64 values."""
  calls, dispatch = [], spec.dispatch

  def recorded(op, implementation, servers):
    calls.append((op, implementation))
    return dispatch(op, implementation, servers)

  monkeypatch.setattr(spec, "dispatch", recorded)
  w = jnp.asarray(RNG.normal(size=(8, 8, 3, 2)).astype(np.float32))
  x = jnp.asarray(RNG.normal(size=(4, 2, 8, 8)).astype(np.float32))
  qt = qtensor.pack(qtensor.quantize(w, scheme, g, num_in=2))
  exact = np.einsum(
    "btij,ijno->btno", np.asarray(x, np.float64), np.asarray(qtensor.dequantize(qt), np.float64)
  )
  np.testing.assert_allclose(functional.linear(x, qt, 2), exact, rtol=1e-5, atol=1e-5)
  for sizes in (MeshConfig(dp=2, tp=4), MeshConfig(dp=2, fsdp=4)):
    with jax.set_mesh(mesh_lib.make_mesh(sizes)):
      found = jax.jit(lambda x, qt: functional.linear(x, qt, 2))(x, qt)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
  op = {"ternary": "ternary_gemm", "int4": "w4a16_gemm"}[scheme]
  assert calls == [(op, "auto"), (op, "xla"), (op, "auto")]


@pytest.mark.parametrize("scheme", ["ternary", "int4"])
def test_on_a_gpu_a_packed_kernel_is_one_triton_call(scheme, monkeypatch):
  pytest.importorskip("jax_triton", reason="jax-triton needs jax's CUDA plugin (make test)")
  launch = gpu.launch
  monkeypatch.setattr(gpu, "launch", lambda *a, **k: launch(*a, **k | {"compute_capability": 90}))
  monkeypatch.setattr(gpu, "check_cuda", lambda *_: None)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  qt = qtensor.pack(qtensor.quantize(jnp.ones((256, 64)), scheme))
  x = jax.ShapeDtypeStruct((3, 256), jnp.bfloat16)
  lowered = jax.jit(functional.linear).trace(x, qt).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("triton_kernel_call") == 1


def test_recipe_text_round_trip():
  cfg = common.config("minicpm4_8b", quant=QuantConfig(scheme="int4", group_size=16))
  space = {}
  exec(config.as_python(cfg), space)
  assert space["get_config"]() == cfg
  assert config.override(cfg, "quant.scheme", "ternary").quant.scheme == "ternary"
  off = common.config("minicpm4_8b")
  assert config.override(off, "quant.group_size", "32").quant == QuantConfig(group_size=32)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize(
  "scheme, size, packed",
  [("int4", 32, True), ("int4", -1, True), ("ternary", -1, True), ("int8", -1, True)]
  + [("int4", 32, False)],
)
def test_rounded_inputs_times_the_kernel(scheme, size, packed, rows):
  """float64: each row by its largest value to -127..127, then the dequantised kernel."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, 96)).astype(np.float32)
  x[-1] = 0.0 if rows > 1 else x[-1]
  qt = qtensor.quantize(jnp.asarray(rng.normal(size=(96, 5, 8)), jnp.float32), scheme, size)
  qt = (qtensor.pack(qt) if packed else qt).replace(act_bits=8)
  scale = np.abs(x.astype(np.float64)).max(axis=1, keepdims=True) / 127
  rounded = np.round(x / np.where(scale > 0, scale, 1)) * scale
  kernel = np.asarray(qtensor.dequantize(qt), np.float64).reshape(96, -1)
  found = jax.jit(qtensor.matmul)(jnp.asarray(x), qt)
  assert found.shape == (rows, 5, 8)
  np.testing.assert_allclose(found.reshape(rows, -1), rounded @ kernel, rtol=1e-5, atol=1e-4)
  plain = qtensor.matmul(jnp.asarray(x), qt.replace(act_bits=None))
  assert np.abs(found - plain).max() > 1e-3
