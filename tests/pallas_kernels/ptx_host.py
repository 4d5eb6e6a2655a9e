"""The PTX that kernels hold as text, on numpy: `tl.inline_asm_elementwise` in Triton's interpreter.

Registers are arrays of a number a thread. Operands and `mma.m16n8k16` as the PTX manual has them,
with exact products and sums (float64).
"""

import ctypes
import re

import ml_dtypes
import numpy as np

FLOATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


class Results:
  def __init__(self, handles):
    self.handles = handles

  def get_result(self, i):
    return self.handles[i]


def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
  """In place of the method of Triton's InterpreterBuilder, which refuses."""
  from triton.runtime import interpreter

  assert pack == 1
  num = sum(c.startswith("=") for c in constraints.split(","))
  assert num == len(types) and constraints.count(",") + 1 == num + len(values), constraints
  arrays = [np.asarray(v.data) for v in values]
  shape = np.broadcast_shapes(*(a.shape for a in arrays))
  flat = [_bits(np.broadcast_to(a, shape).reshape(-1)) for a in arrays]
  found = run(text, num, flat)
  handles = []
  for bits, kind in zip(found, types, strict=True):
    kind = kind.scalar
    dtype = np.float32 if kind.is_floating() else np.int32
    handles.append(interpreter.TensorHandle(bits.view(dtype).reshape(shape), kind))
  return Results(handles)


def _bits(x):
  return x.view(np.uint32) if x.itemsize == 4 else x.view(np.uint64)


def run(text: str, num_results: int, arguments: list) -> list:
  """The results' registers, uint32 [threads]."""
  registers = {f"${num_results + i}": x for i, x in enumerate(arguments)}

  def value(name):
    return registers[name] if name in registers else np.uint32(int(name, 0))

  for line in re.split(r";\s*", text.replace("{ .reg", ".reg").removesuffix(" }")):
    if not line.strip() or line.strip().startswith(".reg"):
      continue
    name, rest = line.strip().split(" ", 1)
    groups = [g.replace(" ", "").split(",") for g in re.findall(r"\{([^}]*)\}", rest)]
    operands = [x.strip() for x in rest.split(",")]
    if name.startswith("ld.global"):
      (to,), at = groups, value(re.search(r"\[(.*)\]", rest)[1])
      assert name.endswith(f".v{len(to)}.b32") and (at % (4 * len(to)) == 0).all(), line
      words = [np.frombuffer(ctypes.string_at(int(a), 4 * len(to)), np.uint32) for a in at]
      registers |= dict(zip(to, np.stack(words, 1), strict=True))
    elif name.startswith("mma"):
      kind = FLOATS[name.split(".")[-2]]
      left, right = ([value(x) for x in g] for g in groups[1:3])
      before = [value(x).view(np.float32) for x in groups[3]]
      registers |= dict(zip(groups[0], mma(left, right, before, kind), strict=True))
    elif name == "prmt.b32":
      registers[operands[0]] = permuted(*map(value, operands[1:3]), int(operands[3], 0))
    elif name == "shr.u32":
      registers[operands[0]] = value(operands[1]) >> value(operands[2])
    elif name == "lop3.b32":
      assert operands[4] == "0xEA", line  # a & b | c
      a, b, c = map(value, operands[1:4])
      registers[operands[0]] = a & b | c
    elif name == "mov.b32":
      registers[operands[0]] = np.broadcast_to(value(operands[1]), arguments[0].shape)
    else:
      assert name.startswith("prefetch"), line
  return [np.array(registers[f"${i}"]) for i in range(num_results)]


def permuted(a, b, select: int):
  every = [(x >> np.uint32(8 * i)) & np.uint32(255) for x in (a, b) for i in range(4)]
  return sum(every[select >> 4 * i & 7] << np.uint32(8 * i) for i in range(4))


def mma(left, right, before, kind):
  """D = A B + C of every warp; the four registers of D."""
  thread = np.arange(left[0].size)
  warp, g, q = thread // 32, thread % 32 // 4, thread % 4
  A, B = np.zeros((warp[-1] + 1, 16, 16)), np.zeros((warp[-1] + 1, 16, 8))
  for half in range(2):
    for i in range(4):
      numbers = (left[i] >> np.uint32(16 * half)).astype(np.uint16).view(kind)
      A[warp, g + 8 * (i % 2), 2 * q + half + 8 * (i // 2)] = numbers.astype(np.float64)
    for i in range(2):
      numbers = (right[i] >> np.uint32(16 * half)).astype(np.uint16).view(kind)
      B[warp, 2 * q + half + 8 * i, g] = numbers.astype(np.float64)
  D = A @ B
  sums = [D[warp, g + 8 * (i // 2), 2 * q + i % 2] + before[i] for i in range(4)]
  return [x.astype(np.float32).view(np.uint32) for x in sums]
