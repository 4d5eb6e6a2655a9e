"""Packed codes as the left side of a tensor-core product, in registers (Mosaic GPU, Hopper).

wgmma takes its left side from registers: a thread holds pairs of neighbouring inputs of few rows,
here of outputs. Which output is which row is free, and chosen so that a thread's rows are the four
bytes of one word: lane 4 g + q of warp w holds outputs 4 (8 w + g) .. + 3 of a tile of 128, and
inputs 2 q, 2 q + 1 of every eight. What is read and written by these rows goes through the
functions here; interpreted, rows are outputs in their order.

A code becomes a float by writing it under an exponent at which the last bit is worth 1 (128 in
bfloat16, 1024 in float16); that, LOW and the zero point, whole numbers, come off exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.w4a16_gemm import packed

ROWS = 128  # outputs of a tile
INPUTS = 64  # of one product
MAGIC = {"bfloat16": (0x4300, 128, "bf16x2"), "float16": (0x6400, 1024, "f16x2")}


def _array(shape, dtype):
  return plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA)


def _places(shape):
  """(index into the registers, word's byte, tile of eight columns) of a fragment [128, columns]."""
  registers = plgpu.Layout.WGMMA.to_mgpu().registers_shape(shape)
  halves = [d for d in range(2, len(registers)) if registers[d] != 1]
  assert registers[:2] == (2, shape[1] // 8) and [registers[d] for d in halves] == [2], registers
  for index in np.ndindex(registers):
    yield index, 2 * index[0] + index[halves[0]], index[1]


def _fragment(shape, values, is_signed=None):
  """Of a function (byte, tile of columns) -> register."""
  from jax.experimental.mosaic import gpu as mgpu

  layout = plgpu.Layout.WGMMA.to_mgpu()
  registers = np.empty(layout.registers_shape(shape), dtype=object)
  for index, byte, columns in _places(shape):
    registers[index] = values(byte, columns)
  return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=is_signed)


class _Ops:
  """What the functions below need of MLIR; made inside a kernel's lowering."""

  def __init__(self):
    from jax.experimental.mosaic.gpu import utils

    self.utils, self.ir, self.arith = utils, utils.ir, utils.arith
    self.llvm, self.vector = utils.llvm, utils.vector
    self.i32 = self.ir.IntegerType.get_signless(32)
    thread = self.asm("mov.u32 $0, %tid.x;")
    lane = self.arith.remui(thread, self.c(32))
    warp = self.arith.remui(self.arith.divui(thread, self.c(32)), self.c(4))
    self.q = self.arith.remui(lane, self.c(4))
    group = self.arith.divui(lane, self.c(4))
    word = self.arith.addi(self.arith.muli(warp, self.c(8)), group)
    self.first = self.arith.muli(word, self.c(4))  # of the thread's four outputs

  def c(self, value: int):
    return self.utils.c(value, self.i32)

  def vector_type(self, size: int, element):
    return self.ir.VectorType.get((size,), element)

  def asm(self, text: str, *operands):
    constraints = ",".join(["=r"] + ["r"] * len(operands))
    return self.llvm.inline_asm(self.i32, list(operands), text, constraints)

  def at(self, memref, *indices):
    """Pointer to an element of a plain memory reference."""
    i64, arith = self.ir.IntegerType.get_signless(64), self.arith
    strides, _ = self.ir.MemRefType(memref.type).get_strides_and_offset()
    assert all(stride > 0 for stride in strides), memref.type
    offset = self.utils.c(0, i64)
    for index, stride in zip(indices, strides, strict=True):
      step = arith.muli(arith.extui(i64, index), self.utils.c(stride, i64))
      offset = arith.addi(offset, step)
    element = self.ir.MemRefType(memref.type).element_type
    return self.utils.getelementptr(self.utils.memref_ptr(memref), [offset], element)


def weights(codes_ref, zero_ref, *, chunk: int, bits: int, low: int, dtype, interpreted: bool):
  """code + low - zero [128, 64] of inputs 64 chunk .. of a tile of codes [rows, 128] in SMEM.

  zero_ref: [128] int8 in GMEM, or None.
  """
  if interpreted:
    w_KN = packed.unpack(codes_ref[...], bits, codes_ref.shape[0] * 8 // bits).astype(jnp.int32)
    w_kN = w_KN[chunk * INPUTS : (chunk + 1) * INPUTS] + low
    return (w_kN if zero_ref is None else w_kN - zero_ref[...][None]).T.astype(dtype)

  magic, whole, kind = MAGIC[str(jnp.dtype(dtype))]
  refs = (codes_ref,) if zero_ref is None else (codes_ref, zero_ref)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),) * len(refs), return_type=_array((ROWS, INPUTS), dtype)
  )
  def run(_, codes, zero=None):
    ops = _Ops()
    arith = ops.arith
    # Times 1, but not known to be: a constant mask would be loaded again for every use.
    one = arith.minui(ops.asm("mov.u32 $0, %nctaid.z;"), ops.c(1))
    mask = arith.muli(one, ops.c((2**bits - 1) * 0x10001))
    float_type = ops.utils.dtype_to_ir_type(jnp.dtype(dtype))
    pair = ops.vector_type(2, float_type)
    shift = _pair(ops, float_type, ops.c(whole - low))
    zeros = [None if zero is None else _zero(ops, float_type, zero, byte) for byte in range(4)]

    @functools.cache
    def words(columns):
      """A word of codes at the thread's inputs of eight, and the same moved by one code."""
      at = chunk * INPUTS + 8 * columns
      if bits == 4:
        row, word_shift = arith.addi(ops.q, ops.c(at // 2)), None
      else:
        half = arith.divui(ops.q, ops.c(2))
        row = arith.addi(half, ops.c(at // 4))
        word_shift = arith.muli(arith.remui(ops.q, ops.c(2)), ops.c(4))
      word = ops.llvm.load(ops.i32, ops.at(codes, row, ops.first))
      if word_shift is not None:
        word = arith.shrui(word, word_shift)
      return word, arith.shrui(word, ops.c(bits))

    def value(byte, columns):
      select = byte | byte << 4 | (4 + byte) << 8 | (4 + byte) << 12
      both = ops.asm(f"prmt.b32 $0, $1, $2, {select};", *words(columns))
      as_float = ops.asm(f"lop3.b32 $0, $1, $2, {magic * 0x10001}, 0xEA;", both, mask)
      exact = ops.asm(f"sub.rn.{kind} $0, $1, $2;", as_float, shift)
      if zero is not None:
        exact = ops.asm(f"sub.rn.{kind} $0, $1, $2;", exact, zeros[byte])
      return ops.llvm.bitcast(pair, exact)

    return _fragment((ROWS, INPUTS), value)

  return run(*refs)


def _pair(ops, float_type, number):
  """A whole number twice, as the bits of two floats."""
  number = ops.arith.sitofp(float_type, number)
  both = ops.vector.broadcast(ops.vector_type(2, float_type), number)
  return ops.llvm.bitcast(ops.i32, both)


def _zero(ops, float_type, zero, byte: int):
  """Zero point of the thread's output `byte`, as `_pair`."""
  i8 = ops.ir.IntegerType.get_signless(8)
  number = ops.llvm.load(i8, ops.at(zero, ops.arith.addi(ops.first, ops.c(byte))))
  return _pair(ops, float_type, ops.arith.extsi(ops.i32, number))


def scales(scale_ref, columns: int, interpreted: bool):
  """[128, columns] float32 of a scale an output; scale_ref: [128] in GMEM."""
  if interpreted:
    scale_N = scale_ref[...].astype(jnp.float32)
    return jax.lax.broadcast_in_dim(scale_N, (ROWS, columns), (0,))

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_array((ROWS, columns), jnp.float32))
  def run(_, scale):
    ops = _Ops()
    f32 = ops.ir.F32Type.get()
    element = ops.ir.MemRefType(scale.type).element_type
    four = ops.llvm.load(ops.vector_type(4, element), ops.at(scale, ops.first))
    if element != f32:
      four = ops.arith.extf(ops.vector_type(4, f32), four)
    numbers = [ops.vector.extract(four, [], [i]) for i in range(4)]
    pairs = [ops.vector.broadcast(ops.vector_type(2, f32), x) for x in numbers]
    return _fragment((ROWS, columns), lambda byte, _: pairs[byte])

  return run(scale_ref)


def store(y_Nm, out_ref):
  """y [128, columns] to out_ref [m, 128] in GMEM, in its type; the first m columns of 8 or more."""
  (rows, columns), kept = y_Nm.shape, out_ref.shape[0]

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def run(_, y, out):
    ops = _Ops()
    f32, element = ops.ir.F32Type.get(), ops.ir.MemRefType(out.type).element_type
    found = {}
    for index, byte, at in _places((rows, columns)):
      found[byte, at] = y.registers[index]
    for at in range(columns // 8):
      for i in range(2):
        four = [ops.vector.extract(found[byte, at], [], [i]) for byte in range(4)]
        four = ops.vector.from_elements(ops.vector_type(4, f32), four)
        if element != f32:
          four = ops.arith.truncf(ops.vector_type(4, element), four)
        m = ops.arith.addi(ops.arith.muli(ops.q, ops.c(2)), ops.c(8 * at + i))
        if 8 * at + 8 <= kept:
          ops.llvm.store(four, ops.at(out, m, ops.first))
        elif 8 * at + i < kept:
          is_kept = ops.arith.cmpi(ops.arith.CmpIPredicate.ult, m, ops.c(kept))
          with ops.utils.when(is_kept):
            ops.llvm.store(four, ops.at(out, m, ops.first))

  run(y_Nm, out_ref)
