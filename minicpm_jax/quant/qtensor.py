"""QTensor: a quantised kernel as a parameter leaf (quantization.md 0 and 10).

It stands where a float kernel [*in, *out] stood, with the same leading axes (layers, experts), and
is a plain pytree: jit, scan over its leading axis, donation, sharding and Orbax see arrays. Groups
lie along the inputs, flattened in memory order (which is HF's order of columns).

  value[k, n] = scale[group(k), n] * (code[k, n] + offset - zero[group(k), n])

group(k) is k // group_size, or g_idx[k] where act order was used. Packed codes share bytes along
the inputs: byte r holds inputs r*f .. r*f+f-1, the first in its lowest bits, as unsigned
code - low (f = 8 / bits; the last byte of an uneven length is filled with code `low`). int8 codes
have a form for running on a CPU, `store_by_output`: a matrix [out, in]. Act order
has a form for running too, `sort_groups`: rows of packed codes in the order of their groups, so
that the packed matmuls serve it and only the inputs x are permuted.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from minicpm_jax.core import mesh, types
from minicpm_jax.quant import schemes
from pallas_kernels.ternary_gemm import api as ternary_api
from pallas_kernels.w4a16_gemm import api as w4a16_api
from pallas_kernels.w8a16_gemm import api as w8a16_api


@flax.struct.dataclass
class QTensor:
  """Codes, scales and what they mean; `shape` is that of one kernel without leading axes.

  codes: [*lead, *in, *out] int4/int8, or packed uint8 [*lead, ceil(in / f), *out], or by output
    int8 [out, in], both flattened.
  scale: [*lead, Q, *out] float; zero: like scale, integers, None = symmetric;
  g_idx: [*lead, in] int32 group of every input, None = consecutive groups;
  order: [*lead, in] int32, of packed codes alone: row r of the codes is input order[r], and in this
    order groups are consecutive.
  act_bits: 8 = `matmul` rounds every row of its inputs (`fake_rows`); the forward sets it.
  is_table: it stands for an embedding table [V, D], which is the head kernel [D, V] of `shape`
    turned round: groups lie along D, `dequantize` gives the table, `rows` some rows of it.
  """

  codes: Any
  scale: Any
  zero: Any = None
  g_idx: Any = None
  order: Any = None
  scheme: str = flax.struct.field(pytree_node=False, default="int4")
  group_size: int = flax.struct.field(pytree_node=False, default=-1)
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
  num_in: int = flax.struct.field(pytree_node=False, default=1)
  is_packed: bool = flax.struct.field(pytree_node=False, default=False)
  is_by_output: bool = flax.struct.field(pytree_node=False, default=False)
  act_bits: int | None = flax.struct.field(pytree_node=False, default=None)
  is_table: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def lead(self) -> tuple[int, ...]:
    """Leading axes (layers, experts) of the arrays."""
    return tuple(self.scale.shape[: self.scale.ndim - 1 - len(self.out_shape)])

  @property
  def in_size(self) -> int:
    return math.prod(self.shape[: self.num_in])

  @property
  def out_shape(self) -> tuple[int, ...]:
    return self.shape[self.num_in :]

  @property
  def num_groups(self) -> int:
    return self.scale.shape[len(self.lead)]

  @property
  def full_shape(self) -> tuple[int, ...]:
    """Shape of the floats that this stands for, leading axes included."""
    return self.lead + (self.shape[::-1] if self.is_table else self.shape)

  @property
  def dtype(self) -> Any:
    """Of the scales, which is what the kernel is exported in by default."""
    return self.scale.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of the arrays (an int4 code counts half a byte)."""
    bits = 0
    for x in jax.tree.leaves(self):
      bits += x.size * (4 if x.dtype == jnp.int4 else 8 * jnp.dtype(x.dtype).itemsize)
    return bits // 8


def is_qtensor(x: Any) -> bool:
  return isinstance(x, QTensor)


def grouped(
  w: Shaped[types.AnyArray, "..."], num_in: int, num_groups: int, num_lead: int = 0
) -> Shaped[types.AnyArray, "..."]:
  """[*lead, *in, *out] -> [*lead, Q, g, out]."""
  lead, rest = w.shape[:num_lead], w.shape[num_lead:]
  width = math.prod(rest[:num_in])
  return w.reshape(*lead, num_groups, width // num_groups, math.prod(rest[num_in:]))


def quantize(
  w: Float[types.AnyArray, "..."],
  scheme: str = "ternary",
  group_size: int = -1,
  *,
  num_in: int = 1,
  num_lead: int = 0,
  scale_dtype: Any = jnp.float32,
  is_table: bool = False,
  name: str = "kernel",
) -> QTensor:
  """Codes and scales of a kernel [*lead, *in, *out] by the scheme's own rule (`schemes`).

  The scale is rounded to `scale_dtype` before codes are taken. is_table: `w` is an embedding table
  [V, D] (see QTensor). Raises ValueError where group_size does not divide the inputs, and (outside
  jit) where a scale is beyond `scale_dtype`.
  """
  w = jnp.asarray(w)
  if is_table:
    if w.ndim != 2 or num_lead:
      raise ValueError(f"table: found shape {w.shape} behind {num_lead} axes, expected [V, D]")
    w = w.T
  shape = w.shape[num_lead:]
  if not 0 < num_in < len(shape):
    raise ValueError(f"num_in: found {num_in}, expected 1..{len(shape) - 1} for kernel {shape}")
  num_groups = schemes.group_count(math.prod(shape[:num_in]), group_size, name)
  codes, scale = _quantized(w, scheme, num_in, num_groups, num_lead, jnp.dtype(scale_dtype))
  _check_scales(scale, w, name)
  return QTensor(
    codes=codes,
    scale=scale,
    scheme=scheme,
    group_size=group_size,
    shape=tuple(shape),
    num_in=num_in,
    is_table=is_table,
  )


# Eager, one program a shape instead of fifteen; inline: under jit the caller's program stays.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5), inline=True)
def _quantized(w, scheme, num_in, num_groups, num_lead, scale_dtype):
  rule, lead, shape = schemes.get(scheme), w.shape[:num_lead], w.shape[num_lead:]
  w_QgO = grouped(w, num_in, num_groups, num_lead)
  scale = rule.scale(w_QgO).astype(scale_dtype)
  codes = rule.codes(w_QgO, scale.astype(jnp.float32))
  codes = codes.astype(jnp.int8).astype(rule.dtype).reshape(w.shape)
  return codes, scale.reshape(*lead, num_groups, *shape[num_in:])


def _check_scales(scale: Float[types.AnyArray, "..."], w: Any = None, name: str = "") -> None:
  """Refuses scales (of weights `w`) that are not finite; says nothing about traced arrays."""
  if isinstance(scale, jax.core.Tracer) or isinstance(w, jax.core.Tracer):
    return
  with jax.ensure_compile_time_eval():  # under jit too, scales that are known are checked
    is_finite = bool(jnp.all(jnp.isfinite(jnp.asarray(scale).astype(jnp.float32))))
  if not is_finite:
    found = "scale: found inf or nan"
    if w is not None:
      found = f"{name}: found weights up to {float(jnp.max(jnp.abs(w.astype(jnp.float32)))):.4g}"
    raise ValueError(
      f"{found}, expected finite weights whose group scales are within "
      f"{jnp.dtype(scale.dtype).name} (at most {float(jnp.finfo(scale.dtype).max):.5g})"
    )


def make(
  codes: Shaped[types.AnyArray, "..."],
  scale: Float[types.AnyArray, "..."],
  scheme: str,
  *,
  group_size: int,
  num_in: int = 1,
  num_lead: int = 0,
  zero: Any = None,
  g_idx: Any = None,
) -> QTensor:
  """A QTensor of given codes [*lead, *in, *out] (from a solver or a file), checked for shape and,
  where they are not traced, finite scales and range: a cast to int4 would wrap 9 to -7."""
  rule = schemes.get(scheme)
  lead, shape = tuple(codes.shape[:num_lead]), tuple(codes.shape[num_lead:])
  width = math.prod(shape[:num_in])
  groups = schemes.group_count(width, group_size)
  for name, x, want in (
    ("scale", scale, (*lead, groups, *shape[num_in:])),
    ("zero", zero, (*lead, groups, *shape[num_in:])),
    ("g_idx", g_idx, (*lead, width)),
  ):
    if x is not None and tuple(x.shape) != want:
      raise ValueError(f"{name}: found shape {tuple(x.shape)}, expected {want}")
  _check_scales(scale)
  codes = jnp.asarray(codes)
  if codes.dtype != rule.dtype or rule.dtype != jnp.int4:
    _check_range(codes, rule)
  return QTensor(
    codes=codes.astype(rule.dtype),
    scale=jnp.asarray(scale),
    zero=None if zero is None else jnp.asarray(zero).astype(jnp.int8),
    g_idx=None if g_idx is None else jnp.asarray(g_idx).astype(jnp.int32),
    scheme=scheme,
    group_size=group_size,
    shape=shape,
    num_in=num_in,
  )


def _check_range(codes: Shaped[types.AnyArray, "..."], rule: schemes.Scheme) -> None:
  if isinstance(codes, jax.core.Tracer) or not codes.size:
    return
  with jax.ensure_compile_time_eval():  # under jit too, codes that are known are checked
    codes = codes.astype(jnp.int8) if codes.dtype == jnp.int4 else codes
    low, high = int(jnp.min(codes)), int(jnp.max(codes))
  if low < rule.low or high > rule.high:
    raise ValueError(
      f"codes: found codes {low}..{high}, expected {rule.low}..{rule.high} ({rule.name})"
    )


# --- Codes in bytes ------------------------------------------------------------------------------


def pack(qt: QTensor) -> QTensor:
  """The same tensor with 8 / bits codes a byte along the inputs."""
  return qt if qt.is_packed else _packed(unpack(qt))


@functools.partial(jax.jit, inline=True)
def _packed(qt: QTensor) -> QTensor:
  rule = schemes.get(qt.scheme)
  per_byte, num_lead = 8 // rule.bits, len(qt.lead)
  flat = qt.codes.astype(jnp.int8).reshape(*qt.lead, qt.in_size, *qt.out_shape)
  unsigned = (flat.astype(jnp.int32) - rule.low).astype(jnp.uint8)
  pad = [(0, 0)] * unsigned.ndim
  pad[num_lead] = (0, -qt.in_size % per_byte)
  unsigned = jnp.pad(unsigned, pad)
  parts = unsigned.reshape(*qt.lead, -1, per_byte, *qt.out_shape)
  packed = jnp.zeros(parts.shape[: num_lead + 1] + qt.out_shape, jnp.uint8)
  for j in range(per_byte):
    packed |= jax.lax.index_in_dim(parts, j, num_lead + 1, keepdims=False) << (rule.bits * j)
  return qt.replace(codes=packed, is_packed=True)


def sort_groups(qt: QTensor) -> QTensor:
  """The same tensor packed, rows in the order of their groups: `order` in the place of `g_idx`.

  For arrays that are not traced. Groups of unequal size have no such form: returned as it is.
  """
  if qt.g_idx is None:
    return qt
  g_idx, size = np.asarray(qt.g_idx), qt.in_size // qt.num_groups
  order = np.argsort(g_idx, axis=-1, kind="stable")
  if np.any(np.take_along_axis(g_idx, order, axis=-1) != np.arange(qt.in_size) // size):
    return qt
  qt, num_lead = unpack(qt), len(qt.lead)
  codes = qt.codes.reshape(*qt.lead, qt.in_size, *qt.out_shape)
  index = order.reshape(*order.shape, *(1,) * len(qt.out_shape))
  codes = jnp.take_along_axis(codes, jnp.asarray(index), axis=num_lead)
  order = jnp.asarray(order.astype(np.int32))
  return pack(qt.replace(codes=codes.reshape(qt.codes.shape), g_idx=None, order=order))


def can_store_by_output(qt: QTensor) -> bool:
  """True for one int8 kernel with a scale an output, its inputs in their order."""
  is_plain = qt.zero is None and qt.g_idx is None and qt.order is None
  return qt.scheme == "int8" and qt.num_groups == 1 and is_plain and not qt.lead


def store_by_output(qt: QTensor) -> QTensor:
  """The same tensor with int8 codes [out, in], where it `can_store_by_output`: the products of
  integers on a CPU read it so (`pallas_kernels.w8a16_gemm.xla`). `unpack` goes back."""
  if qt.is_by_output:
    return qt
  codes_NK = unpack(qt).codes.reshape(qt.in_size, -1).T
  return qt.replace(codes=codes_NK, is_packed=False, is_by_output=True)


def unpack(qt: QTensor) -> QTensor:
  """The same tensor with one code an element, in the kernel's shape and the order of its inputs."""
  if qt.is_by_output:
    return qt.replace(codes=qt.codes.T.reshape(qt.shape), is_by_output=False)
  if not qt.is_packed:
    return qt
  rule = schemes.get(qt.scheme)
  per_byte, num_lead = 8 // rule.bits, len(qt.lead)
  rows = -(-qt.in_size // per_byte)
  want = (*qt.lead, rows, *qt.out_shape)
  if tuple(qt.codes.shape) != want or qt.codes.dtype != jnp.uint8:
    found = f"{qt.codes.dtype}{list(qt.codes.shape)}"
    raise ValueError(f"codes: found {found}, expected packed uint8{list(want)}")
  mask = jnp.uint8(2**rule.bits - 1)
  parts = [(qt.codes >> (rule.bits * j)) & mask for j in range(per_byte)]
  codes = jnp.stack(parts, axis=num_lead + 1).astype(jnp.int32) + rule.low
  codes = codes.reshape(*qt.lead, rows * per_byte, *qt.out_shape)
  codes = jax.lax.slice_in_dim(codes, 0, qt.in_size, axis=num_lead)
  codes, g_idx = codes.astype(jnp.int8), qt.g_idx
  if qt.order is not None:
    group = jnp.arange(qt.in_size, dtype=jnp.int32) // (qt.in_size // qt.num_groups)
    g_idx = _put_back(jnp.broadcast_to(group, qt.order.shape), qt.order, num_lead)
    codes = _put_back(codes, qt.order, num_lead)
  codes = codes.astype(rule.dtype).reshape(*qt.lead, *qt.shape)
  return qt.replace(codes=codes, g_idx=g_idx, order=None, is_packed=False)


def _put_back(rows: Any, order: Any, num_lead: int) -> Any:
  """rows[r] at place order[r] of the axis behind the leading ones."""
  put = lambda x, at: jnp.zeros_like(x).at[at].set(x)  # noqa: E731
  for _ in range(num_lead):
    put = jax.vmap(put)
  return put(rows, order)


# --- Floats --------------------------------------------------------------------------------------


def dequantize(qt: QTensor, dtype: Any = jnp.float32) -> Float[types.AnyArray, "..."]:
  """The kernel [*lead, *in, *out], or table [V, D]: computed in float32, then cast."""
  if qt.is_table:
    return dequantize(qt.replace(is_table=False), dtype).T
  qt, rule, num_lead = unpack(qt), schemes.get(qt.scheme), len(qt.lead)
  codes = qt.codes.astype(jnp.int8).astype(jnp.float32)
  out = math.prod(qt.out_shape)
  scale = qt.scale.astype(jnp.float32).reshape(*qt.lead, qt.num_groups, out)
  zero = None if qt.zero is None else qt.zero.astype(jnp.float32).reshape(scale.shape)
  if qt.g_idx is None:
    codes = grouped(codes, qt.num_in, qt.num_groups, num_lead)
    scale = jnp.expand_dims(scale, -2)
    zero = None if zero is None else jnp.expand_dims(zero, -2)
  else:
    codes = codes.reshape(*qt.lead, qt.in_size, out)
    index = jnp.expand_dims(qt.g_idx, -1)
    scale = jnp.take_along_axis(scale, index, axis=-2)
    zero = None if zero is None else jnp.take_along_axis(zero, index, axis=-2)
  if rule.offset:
    codes = codes + rule.offset
  if zero is not None:
    codes = codes - zero
  return (codes * scale).astype(dtype).reshape(*qt.lead, *qt.shape)


def outputs(qt: QTensor, index: Int[types.AnyArray, " n"]) -> QTensor:
  """The kernel [in, n] of chosen outputs of a kernel [in, out] without leading axes."""
  if qt.lead or len(qt.out_shape) != 1:
    raise ValueError(f"kernel: found {qt.full_shape} with {qt.num_in} inputs, expected [in, out]")

  def take(name: str) -> Any:
    x, is_first = getattr(qt, name), qt.is_by_output and name == "codes"
    return None if x is None else jnp.take(jnp.asarray(x), index, axis=0 if is_first else -1)

  arrays = {name: take(name) for name in ("codes", "scale", "zero")}
  return qt.replace(**arrays, shape=(*qt.shape[:-1], len(index)))


def rows(
  qt: QTensor, index: Int[types.AnyArray, "..."], dtype: Any
) -> Float[types.AnyArray, "..."]:
  """Rows `index` of a table [V, D], as floats."""
  if not qt.is_table:
    raise ValueError(f"table: found a kernel {qt.full_shape}, expected the codes of a table")
  found = dequantize(outputs(qt, jnp.reshape(index, (-1,))), dtype)
  return jnp.reshape(found, (*index.shape, found.shape[-1]))


_PACKED = {"int4": w4a16_api.matmul, "ternary": ternary_api.matmul, "int8": w8a16_api.matmul}


def matmul(
  x: Float[types.AnyArray, "*rows"], qt: QTensor, dtype: Any = None
) -> Float[types.AnyArray, "*out"]:
  """x [*rows, *in] times the kernel, in `dtype` (None: x's).

  With `act_bits` the rows of x are rounded first (`fake_rows`; no gradient in x).
  Codes by output, and packed int4, int8 and ternary ones in consecutive or sorted groups, go
  through the matmuls of `pallas_kernels` (on a mesh as `mesh.by_rows` says). Others: with one
  scale an output channel and no zero point y = (x @ T) s, exact codes in the product and the scale
  after it; groups dequantised in float32, cast, multiplied.
  """
  width, lead, qt = qt.in_size, x.shape[: x.ndim - qt.num_in], qt.replace(is_table=False)
  dtype = x.dtype if dtype is None else dtype
  if qt.lead:
    raise ValueError(f"kernel: found leading axes {qt.lead}, expected one kernel (scan over them)")
  if tuple(x.shape[x.ndim - qt.num_in :]) != qt.shape[: qt.num_in]:
    raise ValueError(f"x: found shape {x.shape}, expected [..., *{qt.shape[: qt.num_in]}]")
  x_MK = x.reshape(-1, width)
  x_MK = x_MK if qt.act_bits is None else fake_rows(x_MK)
  rule = schemes.get(qt.scheme)
  if qt.is_by_output:
    op = functools.partial(w8a16_api.matmul_by_output, out_dtype=dtype)
    y_MN = mesh.by_rows(op, (x_MK,), (qt.codes, qt.scale.reshape(1, -1)))
  elif has_packed_matmul(qt):
    x_MK = x_MK if qt.order is None else jnp.take(x_MK, qt.order, axis=1)
    y_MN = _packed_matmul(x_MK, qt, dtype)
  elif qt.num_groups == 1 and qt.zero is None and not rule.offset:
    codes_KN = unpack(qt).codes.astype(jnp.int8).reshape(width, -1).astype(x.dtype)
    y_MN = jnp.matmul(x_MK, codes_KN, preferred_element_type=jnp.promote_types(x.dtype, dtype))
    y_MN = y_MN * qt.scale.reshape(1, -1).astype(jnp.float32)
  else:
    w_KN = dequantize(qt, x.dtype).reshape(width, -1)
    y_MN = jnp.matmul(x_MK, w_KN, preferred_element_type=jnp.promote_types(x.dtype, dtype))
  return y_MN.astype(dtype).reshape(*lead, *qt.out_shape)


def has_packed_matmul(qt: QTensor) -> bool:
  """True where an op of `pallas_kernels` takes the codes as they are stored."""
  is_symmetric = qt.zero is None or qt.scheme == "int4"
  return qt.is_packed and qt.scheme in _PACKED and qt.g_idx is None and is_symmetric


def _packed_matmul(
  x_MK: Float[types.AnyArray, "M K"], qt: QTensor, dtype: Any
) -> Float[types.AnyArray, "M N"]:
  arrays = [a.reshape(a.shape[0], -1) for a in (qt.codes, qt.scale, qt.zero) if a is not None]
  op = functools.partial(_PACKED[qt.scheme], group_size=qt.group_size, out_dtype=dtype)
  return mesh.by_rows(op, (x_MK,), tuple(arrays))


def fake_rows(x_MK: Float[types.AnyArray, "M K"]) -> Float[types.AnyArray, "M K"]:
  """x rounded to 8 bits, one scale a row: its largest value / 127. What is not finite stays so."""
  x32_MK = x_MK.astype(jnp.float32)
  scale_M1 = jnp.max(jnp.abs(x32_MK), axis=-1, keepdims=True) * (1.0 / 127)
  scale_M1 = jnp.where(scale_M1 > 0, scale_M1, 1.0)
  return (jnp.clip(jnp.round(x32_MK / scale_M1), -127, 127) * scale_M1).astype(x_MK.dtype)
