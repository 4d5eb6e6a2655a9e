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


def _fragment(shape, values):
  """Of a function (byte, tile of columns) -> register."""
  from jax.experimental.mosaic import gpu as mgpu

  layout = plgpu.Layout.WGMMA.to_mgpu()
  registers = np.empty(layout.registers_shape(shape), dtype=object)
  for index, byte, columns in _places(shape):
    registers[index] = values(byte, columns)
  return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


class Ops:
  """The instructions that the functions below use; made inside a kernel's lowering.

  Numbers are int32 of a thread; the tests have the same methods over numpy.
  """

  def __init__(self):
    from jax.experimental.mosaic.gpu import utils

    self.utils, self.ir, self.arith = utils, utils.ir, utils.arith
    self.llvm, self.vector = utils.llvm, utils.vector
    self.i32 = self.ir.IntegerType.get_signless(32)

  def c(self, value: int):
    return self.utils.c(value, self.i32)

  def thread(self):
    return self.asm("mov.u32 $0, %tid.x;")

  def grid_depth(self):
    return self.asm("mov.u32 $0, %nctaid.z;")

  def add(self, a, b):
    return self.arith.addi(a, b)

  def mul(self, a, b):
    return self.arith.muli(a, b)

  def div(self, a, b):
    return self.arith.divui(a, b)

  def rem(self, a, b):
    return self.arith.remui(a, b)

  def least(self, a, b):
    return self.arith.minui(a, b)

  def shift_right(self, a, b):
    return self.arith.shrui(a, b)

  def word(self, ref, row, column):
    """Four bytes of a plain reference, the first lowest."""
    return self.llvm.load(self.i32, self.at(ref, row, column))

  def signed_byte(self, ref, index):
    i8 = self.ir.IntegerType.get_signless(8)
    return self.arith.extsi(self.i32, self.llvm.load(i8, self.at(ref, index)))

  def choose_bytes(self, a, b, select: int):
    """Byte i is byte `select >> 4 i & 15` of a (0-3) and b (4-7)."""
    return self.asm(f"prmt.b32 $0, $1, $2, {select};", a, b)

  def put(self, bits, mask, constant: int):
    """bits & mask | constant."""
    return self.asm(f"lop3.b32 $0, $1, $2, {constant}, 0xEA;", bits, mask)

  def subtract(self, a, b, kind: str):
    """Of two pairs of 16-bit floats."""
    return self.asm(f"sub.rn.{kind} $0, $1, $2;", a, b)

  def float_pair(self, number, dtype):
    """A whole number twice, as the bits of two floats."""
    element = self.utils.dtype_to_ir_type(jnp.dtype(dtype))
    number = self.arith.sitofp(element, number)
    return self.llvm.bitcast(self.i32, self.vector.broadcast(self.pair_of(element), number))

  def as_floats(self, pair, dtype):
    return self.llvm.bitcast(self.pair_of(self.utils.dtype_to_ir_type(jnp.dtype(dtype))), pair)

  def pair_of(self, element):
    return self.ir.VectorType.get((2,), element)

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


def place(ops):
  """(first of the thread's four outputs, q)."""
  lane = ops.rem(ops.thread(), ops.c(32))
  warp = ops.rem(ops.div(ops.thread(), ops.c(32)), ops.c(4))
  word = ops.add(ops.mul(warp, ops.c(8)), ops.div(lane, ops.c(4)))
  return ops.mul(word, ops.c(4)), ops.rem(lane, ops.c(4))


def unpacker(ops, codes, zero, *, chunk: int, bits: int, low: int, dtype):
  """Function (byte, tile of eight inputs) -> the bits of two floats, code + low - zero."""
  magic, whole, kind = MAGIC[str(jnp.dtype(dtype))]
  first, q = place(ops)
  # Times 1, but not known to be: a constant mask would be loaded again for every use.
  one = ops.least(ops.grid_depth(), ops.c(1))
  mask = ops.mul(one, ops.c((2**bits - 1) * 0x10001))
  shift = ops.float_pair(ops.c(whole - low), dtype)
  zeros = []
  if zero is not None:
    for byte in range(4):
      number = ops.signed_byte(zero, ops.add(first, ops.c(byte)))
      zeros.append(ops.float_pair(number, dtype))

  @functools.cache
  def words(columns):
    """A word of codes at the thread's inputs of eight, and the same moved by one code."""
    at = chunk * INPUTS + 8 * columns
    if bits == 4:
      word = ops.word(codes, ops.add(q, ops.c(at // 2)), first)
    else:
      row = ops.add(ops.div(q, ops.c(2)), ops.c(at // 4))
      half = ops.mul(ops.rem(q, ops.c(2)), ops.c(4))
      word = ops.shift_right(ops.word(codes, row, first), half)
    return word, ops.shift_right(word, ops.c(bits))

  def value(byte, columns):
    select = byte | byte << 4 | (4 + byte) << 8 | (4 + byte) << 12
    both = ops.choose_bytes(*words(columns), select)
    exact = ops.subtract(ops.put(both, mask, magic * 0x10001), shift, kind)
    return ops.subtract(exact, zeros[byte], kind) if zeros else exact

  return value


def weights(codes_ref, zero_ref, *, chunk: int, bits: int, low: int, dtype, interpreted: bool):
  """code + low - zero [128, 64] of inputs 64 chunk .. of a tile of codes [rows, 128] in SMEM.

  zero_ref: [128] int8 in GMEM, or None.
  """
  if interpreted:
    w_KN = packed.unpack(codes_ref[...], bits, codes_ref.shape[0] * 8 // bits).astype(jnp.int32)
    w_kN = w_KN[chunk * INPUTS : (chunk + 1) * INPUTS] + low
    return (w_kN if zero_ref is None else w_kN - zero_ref[...][None]).T.astype(dtype)

  refs = (codes_ref,) if zero_ref is None else (codes_ref, zero_ref)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),) * len(refs), return_type=_array((ROWS, INPUTS), dtype)
  )
  def run(_, codes, zero=None):
    ops = Ops()
    value = unpacker(ops, codes, zero, chunk=chunk, bits=bits, low=low, dtype=dtype)
    return _fragment((ROWS, INPUTS), lambda *place: ops.as_floats(value(*place), dtype))

  return run(*refs)


def scales(scale_ref, columns: int, interpreted: bool):
  """[128, columns] float32 of a scale an output; scale_ref: [128] in GMEM."""
  if interpreted:
    scale_N = scale_ref[...].astype(jnp.float32)
    return jax.lax.broadcast_in_dim(scale_N, (ROWS, columns), (0,))

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_array((ROWS, columns), jnp.float32))
  def run(_, scale):
    ops = Ops()
    first, _ = place(ops)
    f32, vector_type = ops.ir.F32Type.get(), ops.ir.VectorType.get
    element = ops.ir.MemRefType(scale.type).element_type
    four = ops.llvm.load(vector_type((4,), element), ops.at(scale, first))
    if element != f32:
      four = ops.arith.extf(vector_type((4,), f32), four)
    numbers = [ops.vector.extract(four, [], [i]) for i in range(4)]
    pairs = [ops.vector.broadcast(ops.pair_of(f32), x) for x in numbers]
    return _fragment((ROWS, columns), lambda byte, _: pairs[byte])

  return run(scale_ref)


def store(y_Nm, out_ref):
  """y [128, columns] to out_ref [m, 128] in GMEM, in its type; the first m columns of 8 or more."""
  (rows, columns), kept = y_Nm.shape, out_ref.shape[0]

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
  def run(_, y, out):
    ops = Ops()
    first, q = place(ops)
    f32, vector_type = ops.ir.F32Type.get(), ops.ir.VectorType.get
    element = ops.ir.MemRefType(out.type).element_type
    found = {(byte, at): y.registers[index] for index, byte, at in _places((rows, columns))}
    for at in range(columns // 8):
      for i in range(2):
        four = [ops.vector.extract(found[byte, at], [], [i]) for byte in range(4)]
        four = ops.vector.from_elements(vector_type((4,), f32), four)
        if element != f32:
          four = ops.arith.truncf(vector_type((4,), element), four)
        m = ops.add(ops.mul(q, ops.c(2)), ops.c(8 * at + i))
        if 8 * at + 8 <= kept:
          ops.llvm.store(four, ops.at(out, m, first))
        elif 8 * at + i < kept:
          is_kept = ops.arith.cmpi(ops.arith.CmpIPredicate.ult, m, ops.c(kept))
          with ops.utils.when(is_kept):
            ops.llvm.store(four, ops.at(out, m, first))

  run(y_Nm, out_ref)
