"""PTX of the product of one row: codes become the left side of tensor-core products in registers.

mma.m16n8k16 (PTX manual, "Warp-level matrix instructions"): of lane 4 g + q the first side's four
registers hold pairs of neighbouring inputs, (row g, inputs 2 q, 2 q + 1), (row g + 8, the same),
then both rows at 8 inputs further; the second side's two registers the same inputs of column g; the
result's four floats are row g at columns 2 q, 2 q + 1, then row g + 8. Which output is a row and
which input has which place is free: here a lane's rows are outputs whose codes lie in its words,
and a pair are inputs of two neighbouring rows of bytes. Every column is the one row of
activations, so all lanes of a group end with the sums over the inputs of all four of them.

A field of a byte becomes a float by writing it under an exponent at which the last bit is worth 1
(128 in bfloat16, 1024 in float16). What this and the codes' lowest value add is the same for every
output: `total` adds its negative. The sums are float32; up to 8 (11) of its 24 bits go.

Each function gives (text, constraints) for `tl.inline_asm_elementwise`.
"""

MAGIC = {"bf16": (0x43004300, 128), "f16": (0x64006400, 1024)}
OUTPUTS = 128  # of a warp: 16 a group of lanes
STEP = 8  # rows of bytes of a warp's step: two a lane


def _constraints(outputs: str, *inputs: str) -> str:
  return ",".join([*outputs.split(), *(x for group in inputs for x in group.split())])


def _mma(kind: str, to: list[str], left: list[str], right: list[str], plus: list[str]) -> str:
  sides = ", ".join("{" + ", ".join(side) + "}" for side in (to, left, right, plus))
  return f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {sides};"


def _names(first: int, count: int) -> list[str]:
  return [f"${first + i}" for i in range(count)]


def words() -> tuple[str, str]:
  """Four words of codes at an address: they are read once, and by one program."""
  text = "ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];"
  return text, "=r,=r,=r,=r,l"


def prefetch() -> tuple[str, str]:
  """Nothing, of an address that is read later."""
  return "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l"


def inputs(bits: int) -> tuple[str, str]:
  """The second side's registers, one a field, of the activations at an address: those of two rows
  of bytes."""
  fields = 8 // bits
  found = [f"x{i}" for i in range(fields)]  # x0 .. of the first row of bytes, then of the second
  lines = [f"ld.global.nc.v{fields}.b32 {{{', '.join(found)}}}, [${fields}];"]
  for i in range(fields):
    first, second = found[i // 2], found[fields // 2 + i // 2]
    lines.append(f"prmt.b32 ${i}, {first}, {second}, {0x7632 if i % 2 else 0x5410};")
  text = f"{{ .reg .b32 {', '.join(found)}; {' '.join(lines)} }}"
  return text, _constraints("=r " * fields, "l")


def product(bits: int, kind: str) -> tuple[str, str]:
  """Sums of four outputs with the codes of two words: eight floats, of bytes 0 to 3 twice each.

  Arguments: the words of two rows of bytes, mask, magic, `inputs`, the eight sums before.
  """
  fields = 8 // bits
  first, second, mask, magic = _names(8, 4)
  right, before = _names(12, fields), _names(12 + fields, 8)
  pairs = [[f"a{byte}_{field}" for field in range(fields)] for byte in range(4)]
  lines = [f".reg .b32 both, moved, {', '.join(name for pair in pairs for name in pair)};"]
  for byte in range(4):
    select = byte | byte << 4 | (4 + byte) << 8 | (4 + byte) << 12  # in both halves
    lines.append(f"prmt.b32 both, {first}, {second}, {select};")
    for field in range(fields):
      if field:
        lines.append(f"shr.u32 moved, both, {bits * field};")
      source = "moved" if field else "both"
      lines.append(f"lop3.b32 {pairs[byte][field]}, {source}, {mask}, {magic}, 0xEA;")
  for half in range(2):
    to, plus = _names(4 * half, 4), before[4 * half : 4 * half + 4]
    rows = pairs[2 * half : 2 * half + 2]
    for field in range(0, fields, 2):
      left = [row[field + i] for i in range(2) for row in rows]
      lines.append(_mma(kind, to, left, right[field : field + 2], plus))
      plus = to
  text = "{ " + " ".join(lines) + " }"
  return text, _constraints("=&f " * 8, "r r r r", "r " * fields, "f " * 8)


def total(bits: int, kind: str) -> tuple[str, str]:
  """The sum of all inputs times a factor: four floats. Arguments: a pair of the factor, `inputs`,
  the four sums before."""
  fields = 8 // bits
  right, plus = _names(5, fields), _names(5 + fields, 4)
  lines, to = [], _names(0, 4)
  for field in range(0, fields, 2):
    lines.append(_mma(kind, to, ["$4"] * 4, right[field : field + 2], plus))
    plus = to
  return " ".join(lines), _constraints("=&f " * 4, "r", "r " * fields, "f " * 4)
