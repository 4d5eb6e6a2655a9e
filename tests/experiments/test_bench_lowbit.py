"""Every formulation is the product with the dequantised kernel; bad sizes are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _bench_decode, _bench_lowbit, bench_lowbit
from minicpm_jax.quant import qtensor


@pytest.mark.parametrize("name", _bench_lowbit.FORMULATIONS)
def test_formulation_is_the_product(name):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(1, 64)), jnp.float32)
  form, scheme = _bench_lowbit.FORMULATIONS[name], name.split(":")[0].split()[0]
  found = jax.jit(form.apply)(x, *form.prepare(w))
  if scheme != "float32":
    w = qtensor.dequantize(qtensor.quantize(w, scheme, 64 if "groups" in name else -1))
  expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  assert found.shape == (1, 128)
  error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
  assert error < (0.02 if "int8 activations" in name else 1e-5)


def test_torch_sides_are_the_products():
  pytest.importorskip("torch")
  rng = np.random.default_rng(1)
  kernels = [rng.normal(size=(64, 128)).astype(np.float32) for _ in range(2)]
  x = rng.normal(size=(1, 64)).astype(np.float32)
  bars = {"torch: float32": 1e-5, "torch: int8 activations, int8": 0.02}
  for name, call in _bench_lowbit.torch_sides(kernels, x).items():
    expected = x.astype(np.float64) @ kernels[-1]
    error = np.linalg.norm(call() - expected) / np.linalg.norm(expected)
    assert error < bars.get(name, 0.2), name  # 4 bits, rounded


def test_bad_sizes_are_refused(capsys):
  assert bench_lowbit.main(["bench_lowbit", "--num_in=100"]) == 1
  assert "--num_in: found 100, expected a multiple of 64" in capsys.readouterr().err


def test_the_suite_compares_with_float32_of_the_same_process():
  names = _bench_decode.SUITES["lowbit"]
  assert names[0] == "ours, 16 tokens a dispatch" and "llama.cpp, float32" in names
  assert sum(name.startswith(("ours, int", "ours, ternary")) for name in names) == 6
