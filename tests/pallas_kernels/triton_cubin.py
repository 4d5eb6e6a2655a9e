"""Compiles the Triton kernels of a traced function to cubins, on any machine, and reads what
they use: `table(function, *arrays)` prints a row for every kernel and architecture."""

import dataclasses
import os
import re
import subprocess
import tempfile

import jax

from pallas_kernels.common import gpu


@dataclasses.dataclass(frozen=True)
class Launch:
  kernel: object
  signature: dict
  constants: dict
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True)
class Usage:
  name: str
  arch: int
  registers: int
  spills: int  # bytes of stack a thread
  shared: int  # bytes a program
  products: tuple[str, ...]  # tensor-core instructions, of PTX


def launches_of(function, *avals) -> list[Launch]:
  """The launches of a function of arrays, found by tracing it; each kernel and size once."""
  import jax_triton.triton_lib as lib

  type_of = getattr(lib, "get_triton_type", None) or lib.get_type_id  # jax-triton 0.3; 0.4
  found = []

  def record(kernel, *arrays, out_shape, grid, num_warps, num_stages, compute_capability, **sizes):
    pointers = [*arrays, *jax.tree.leaves(out_shape)]
    types = [type_of(jax.core.ShapedArray(x.shape, x.dtype)) for x in pointers]
    signature = dict(zip(kernel.arg_names, types, strict=False))
    signature |= {name: "constexpr" for name in sizes}
    found.append(Launch(kernel, signature, sizes, num_warps, num_stages))
    return jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), out_shape)

  original, gpu.launch = gpu.launch, record
  try:
    jax.eval_shape(function, *avals)
  finally:
    gpu.launch = original
  unique = {(x.kernel.__name__, repr(x.signature), repr(x.constants)): x for x in found}
  return list(unique.values())


def usage(launch: Launch, arch: int) -> Usage:
  import triton
  from triton.backends.compiler import GPUTarget
  from triton.compiler import ASTSource

  names = launch.kernel.arg_names
  constants = {(names.index(name),): value for name, value in launch.constants.items()}
  pointers = [i for i, name in enumerate(names) if launch.signature[name] != "constexpr"]
  source = ASTSource(
    launch.kernel,
    {name: launch.signature[name] for name in names},
    constants,
    {(i,): [["tt.divisibility", 16]] for i in pointers},
  )
  options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True)
  # Importing jax_triton empties TRITON_CACHE_DIR, which `triton.compile` cannot work with.
  with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
    triton.knobs.cache.dir = cache
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
  tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
  with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    out = subprocess.run(
      [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
    ).stdout
  registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", out).groups())
  shared = compiled.metadata.shared
  products = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync[\w.]+", compiled.asm["ptx"])))
  return Usage(launch.kernel.__name__, arch, registers, stack, shared, tuple(products))


def table(function, *avals, archs=(80, 90)) -> list[Usage]:
  """Usage of every kernel of a function, printed row by row."""
  rows = [usage(launch, arch) for launch in launches_of(function, *avals) for arch in archs]
  for r in rows:
    print(
      f"{r.name:20s} sm_{r.arch}  {r.registers:4d} registers  {r.spills:4d} B spilled  "
      f"{r.shared / 1024:6.1f} KiB shared  {', '.join(r.products)}"
    )
  return rows
