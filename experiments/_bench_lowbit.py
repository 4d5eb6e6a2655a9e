"""Formulations of one row times a low-bit kernel on a CPU, side by side.

Each takes a float kernel once (`prepare`) and is then a function of (x [1, D], arrays). The names
say what is stored and how the sum is written; the one that the model uses is "fused rows".
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax.quant import qtensor
from pallas_kernels.w4a16_gemm import packed, xla_rows
from pallas_kernels.w8a16_gemm import xla as by_output

TILE = 64  # outputs of a tile


class Formulation(NamedTuple):
  prepare: Callable[[Any], tuple[Any, ...]]  # kernel [D, F] float32 -> arrays
  apply: Callable[..., Any]  # (x_1D, *arrays) -> [1, F] float32


def _codes(scheme: str) -> Callable[[Any], tuple[Any, ...]]:
  def prepare(w_DF: Any) -> tuple[Any, ...]:
    qt = qtensor.quantize(w_DF, scheme)
    return qt.codes.astype(jnp.int8), qt.scale

  return prepare


def _packed(scheme: str, group_size: int = -1) -> Callable[[Any], tuple[Any, ...]]:
  def prepare(w_DF: Any) -> tuple[Any, ...]:
    qt = qtensor.pack(qtensor.quantize(w_DF, scheme, group_size))
    return qt.codes, qt.scale

  return prepare


def _words(w_DF: Any) -> tuple[Any, ...]:
  """Eight 4-bit codes of one output in a uint32."""
  codes, scale = _packed("int4")(w_DF)
  bytes_DF = codes.reshape(-1, 4, codes.shape[1]).astype(jnp.uint32)
  return sum(bytes_DF[:, j] << (8 * j) for j in range(4)), scale


def _transposed(w_DF: Any) -> tuple[Any, ...]:
  codes, scale = _codes("int8")(w_DF)
  return jnp.asarray(np.ascontiguousarray(np.asarray(codes).T)), scale


def _int8_dot(contract: int) -> Callable[..., Any]:
  """Activations rounded to int8 by their largest value, products of integers."""

  def apply(x_1D: Any, codes: Any, scale_1F: Any) -> Any:
    s = jnp.max(jnp.abs(x_1D)) / 127
    x8_1D = jnp.rint(x_1D / s).astype(jnp.int8)
    dims = (((1,), (contract,)), ((), ()))
    y_1F = jax.lax.dot_general(x8_1D, codes, dims, preferred_element_type=jnp.int32)
    return y_1F.astype(jnp.float32) * (s * scale_1F)

  return apply


def _integer_library(num_digits: int) -> Callable[..., Any]:
  """Products of integers by the library inside XLA, which takes two rows or more."""

  def apply(x_1D: Any, codes_FD: Any, scale_1F: Any) -> Any:
    if num_digits == by_output.DIGITS:
      return by_output.integer_products(x_1D, codes_FD) * scale_1F
    s = jnp.max(jnp.abs(x_1D)) / 127
    x8_2D = jnp.concatenate([jnp.rint(x_1D / s), jnp.zeros_like(x_1D)]).astype(jnp.int8)
    dims = (((1,), (1,)), ((), ()))
    x8_2D = jax.lax.optimization_barrier(x8_2D)
    y_2F = jax.lax.dot_general(x8_2D, codes_FD, dims, preferred_element_type=jnp.int32)
    return y_2F[:1].astype(jnp.float32) * (s * scale_1F)

  return apply


def _reduce(x_1D: Any, codes_DF: Any, scale_1F: Any) -> Any:
  return jnp.sum(codes_DF.astype(jnp.float32) * x_1D[0][:, None], axis=0)[None] * scale_1F


def _reduce_nibbles(x_1D: Any, codes_RF: Any, scale_1F: Any) -> Any:
  low, high = (f.astype(jnp.float32) for f in packed.fields(codes_RF, 4))
  sums_F = jnp.sum(low * x_1D[0, 0::2, None] + high * x_1D[0, 1::2, None], axis=0)
  return (sums_F - 8 * jnp.sum(x_1D))[None] * scale_1F


def _reduce_words(x_1D: Any, words_RF: Any, scale_1F: Any) -> Any:
  total = 0.0
  for j in range(8):
    field = (words_RF >> jnp.uint32(4 * j)) & jnp.uint32(15)
    total = total + field.astype(jnp.int32).astype(jnp.float32) * x_1D[0, j::8, None]
  return (jnp.sum(total, axis=0) - 8 * jnp.sum(x_1D))[None] * scale_1F


def _unpack_then_dot(x_1D: Any, codes_RF: Any, scale_1F: Any) -> Any:
  codes_DF = packed.unpack(codes_RF, 4, x_1D.shape[1]).astype(jnp.float32) - 8
  return (x_1D @ codes_DF) * scale_1F


def _tiles(x_1D: Any, codes_RF: Any, scale_1F: Any) -> Any:
  """A loop over tiles of outputs, each unpacked into the cache before its product."""
  R, F = codes_RF.shape

  def one(start: Any) -> Any:
    tile_RT = jax.lax.dynamic_slice(codes_RF, (0, start), (R, TILE))
    return (x_1D @ (packed.unpack(tile_RT, 4, x_1D.shape[1]).astype(jnp.float32) - 8))[0]

  return jax.lax.map(one, TILE * jnp.arange(F // TILE)).reshape(1, F) * scale_1F


def _rows(bits: int, low: int) -> Callable[..., Any]:
  return lambda x, codes, scale: xla_rows.matmul_rows(x, codes, scale, bits=bits, low=low)


def _int_sums(bits: int, low: int) -> Callable[..., Any]:
  """Products and sums in 16-bit lanes: a signed code times an int8 is at most 127 * 2^(bits - 1).

  A second loop adds the sums as floats. In whole decode steps this was not faster than "fused
  rows": rounding the inputs and the second loop cost what the integers save.
  """

  def apply(x_1D: Any, codes_RF: Any, scale_QF: Any) -> Any:
    x_scale = jnp.max(jnp.abs(x_1D)) / 127
    per_byte, (Q, F) = 8 // bits, scale_QF.shape
    x_PJ = jnp.rint(x_1D / x_scale).astype(jnp.int16).reshape(-1, xla_rows.UNROLL)
    codes_PrF = codes_RF.reshape(x_PJ.shape[0], -1, F)
    sums_PF = 0
    for r in range(codes_PrF.shape[1]):
      bytes_PF = codes_PrF[:, r].astype(jnp.int16)
      for j in range(per_byte):
        field_PF = (bytes_PF >> jnp.int16(bits * j)) & jnp.int16(2**bits - 1)
        sums_PF += (field_PF + jnp.int16(low)) * x_PJ[:, r * per_byte + j, None]
    sums_PF, y_1F = jax.lax.optimization_barrier(sums_PF), 0.0
    for p in range(x_PJ.shape[0]):
      q = p * Q // x_PJ.shape[0]
      y_1F += sums_PF[p : p + 1].astype(jnp.float32) * scale_QF[q : q + 1]
    return y_1F * x_scale

  return apply


FORMULATIONS = {
  "float32: dot": Formulation(lambda w: (w,), jnp.matmul),
  "int8: int8 activations, int32 dot [D, F]": Formulation(_codes("int8"), _int8_dot(0)),
  "int8: int8 activations, int32 dot [F, D]": Formulation(_transposed, _int8_dot(1)),
  "int8: int8 activations beside a row of zeros, YNNPACK": Formulation(
    _transposed, _integer_library(1)
  ),
  "int8: three int8 digits of float32, YNNPACK": Formulation(
    _transposed, _integer_library(by_output.DIGITS)
  ),
  "int8: convert, dot": Formulation(
    _codes("int8"), lambda x, c, s: (x @ c.astype(jnp.float32)) * s
  ),
  "int8: convert inside a reduction": Formulation(_codes("int8"), _reduce),
  "int8: fused rows": Formulation(_packed("int8"), _rows(8, -127)),
  "int4: unpack, dot": Formulation(_packed("int4"), _unpack_then_dot),
  "int4: unpack inside a reduction": Formulation(_packed("int4"), _reduce_nibbles),
  "int4: uint32 words inside a reduction": Formulation(_words, _reduce_words),
  "int4: loop over tiles, unpack, dot": Formulation(_packed("int4"), _tiles),
  "int4: fused rows": Formulation(_packed("int4"), _rows(4, -8)),
  "int4 in groups of 64: fused rows": Formulation(_packed("int4", 64), _rows(4, -8)),
  "ternary: fused rows": Formulation(_packed("ternary"), _rows(2, -1)),
  "int4: int8 activations, 16-bit sums": Formulation(_packed("int4"), _int_sums(4, -8)),
  "int4 in groups of 64: int8 activations, 16-bit sums": Formulation(
    _packed("int4", 64), _int_sums(4, -8)
  ),
  "ternary: int8 activations, 16-bit sums": Formulation(_packed("ternary"), _int_sums(2, -1)),
}


def torch_sides(kernels: list[np.ndarray], x_1D: np.ndarray) -> dict[str, Callable[[], Any]]:
  """The products of torch's own libraries over all kernels: what a call into one could bring.

  {} without torch. float32 (MKL), int8 of inputs and weights (oneDNN, FBGEMM), and 4 bits in groups
  of 64 for inputs in bfloat16.
  """
  try:
    import torch
  except ImportError:
    return {}
  x = torch.from_numpy(np.array(x_1D))
  floats = [torch.from_numpy(np.array(w)) for w in kernels]
  layers = [torch.nn.Sequential(torch.nn.Linear(*w.shape, bias=False)) for w in floats]
  for layer, w in zip(layers, floats, strict=True):
    layer[0].weight.data = w.T.contiguous()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao has succeeded this API
    ints = [torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}) for layer in layers]
  pack, product = (
    getattr(torch.ops.aten, name)
    for name in ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
  )
  half, fours = x.to(torch.bfloat16), []
  for w in floats:  # scale and middle of a group; the code 8 is 0
    groups = w.T.reshape(w.shape[1], -1, 64)
    scale = groups.abs().amax(-1).clamp(min=1e-12) / 7
    codes = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1)
    fours.append((pack(codes.reshape(w.shape[1], -1), 1), scales.to(torch.bfloat16).contiguous()))

  def run(call: Callable[[Any], Any], arrays: list[Any]) -> Callable[[], Any]:
    def all_of_them() -> Any:
      with torch.inference_mode():
        for a in arrays:
          y = call(a)
      return y.float().numpy()

    return all_of_them

  return {
    "torch: float32": run(lambda w: x @ w, floats),
    "torch: int8 activations, int8": run(lambda layer: layer(x), ints),
    "torch: bfloat16, int4 in groups of 64": run(lambda a: product(half, a[0], 64, a[1]), fours),
  }


def measure(num_in: int, num_out: int, layers: int, repeats: int) -> list[dict[str, Any]]:
  """Medians of `repeats` passes over `layers` kernels of [num_in, num_out], in turn."""
  rng = np.random.default_rng(0)
  kernels = [jnp.asarray(rng.normal(size=(num_in, num_out)), jnp.float32) for _ in range(layers)]
  x_1D = jnp.asarray(rng.normal(size=(1, num_in)), jnp.float32)
  programs, errors = {}, {}
  for name, form in FORMULATIONS.items():
    arrays = [form.prepare(w) for w in kernels]

    def run(x: Any, arrays: Any, form: Formulation = form) -> Any:
      for a in arrays:  # the next product needs all of this one
        y = form.apply(x, *a)
        x = x + 1e-9 * jnp.max(y)
      return y

    program = jax.jit(run).lower(x_1D, arrays).compile()
    size = sum(a.nbytes for a in jax.tree.leaves(arrays))
    programs[name] = (functools.partial(program, x_1D, arrays), size)
  for name, call in torch_sides([np.asarray(w) for w in kernels], np.asarray(x_1D)).items():
    programs[name] = (call, None)
  exact = np.asarray(x_1D, np.float64) @ np.asarray(kernels[-1], np.float64)
  for name, (call, _) in programs.items():
    error = np.asarray(call()) - exact
    errors[name] = float(np.linalg.norm(error) / np.linalg.norm(exact))
  found = {name: [] for name in programs}
  for _ in range(repeats):
    for name, (call, _) in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      found[name].append(time.perf_counter() - start)
  rows, weights = [], num_in * num_out * layers
  base = statistics.median(found["float32: dot"])
  for name, seconds in found.items():
    size, middle = programs[name][1], statistics.median(seconds)
    rows.append(
      {
        "formulation": name,
        "us a product": 1e6 * middle / layers,
        "G weights/s": weights / middle / 1e9,
        "GB/s": None if size is None else size / middle / 1e9,
        "times float32": base / middle,
        "relative error": errors[name],
      }
    )
  return rows
