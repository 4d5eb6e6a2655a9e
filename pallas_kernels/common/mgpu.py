"""What every Mosaic GPU backend (Pallas `plgpu.kernel`, Hopper) checks and shares.

The kernels ask for warpgroup semantics on every jax version: layouts of registers and of shared
memory are inferred, so the same body runs in the interpreter. What jax 0.10's interpreter lacks
(products from registers, or into a sum) is written out for it in the functions here. The last name
of a grid is CUDA's x and may be long; the others are y and z, at most 65535.
"""

import functools
import inspect

import jax
import jax.numpy as jnp

from pallas_kernels.common import gpu, interpret

ROWS = 64  # of a warpgroup's matrix product
MAX_SHARED_BYTES = 227 * 1024  # of one block of threads on Hopper


def is_interpreted(op: str, requested: bool | None) -> bool:
  """Whether to interpret; NotImplementedError where the device in use has no wgmma.

  `requested` None: interpret on a CPU, run on a GPU. False lowers for CUDA from any machine.
  """
  interpreted = interpret.is_interpreted(op, requested, "gpu")
  if not interpreted and jax.default_backend() == "gpu":
    capability = str(getattr(jax.devices()[0], "compute_capability", "none"))
    if capability != "9.0":
      raise NotImplementedError(
        f"{op}: mosaic_gpu needs compute capability 9.0 (Hopper's wgmma), found {capability}"
      )
  return interpreted


def check_arrays(op: str, interpreted: bool, **arrays) -> None:
  """Tensor cores multiply 16-bit floats; float32 is served in the interpreter only, to test it."""
  gpu.check_arrays(op, **arrays)
  dtype = next(iter(arrays.values())).dtype
  if dtype == jnp.float32 and not interpreted:
    raise NotImplementedError(f"{op}: mosaic_gpu multiplies bfloat16 or float16, found {dtype}")


def check_shared_memory(op: str, num_bytes: int, what: str) -> None:
  if num_bytes > MAX_SHARED_BYTES:
    raise NotImplementedError(
      f"{op}: {what} take {num_bytes} bytes of shared memory, a block of threads has "
      f"{MAX_SHARED_BYTES}"
    )


def stages_that_fit(most: int, num_bytes) -> int:
  """The most from 2 to `most` whose num_bytes(stages) a block of threads has; 2 where none fit."""
  return max((n for n in range(2, most + 1) if num_bytes(n) <= MAX_SHARED_BYTES), default=2)


def padded(x, *multiples: int):
  """Zeros behind every axis, up to these multiples."""
  return jnp.pad(x, [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)])


def across(x_R, width: int):
  """[R, width] of a number a row."""
  return jax.lax.broadcast_in_dim(x_R, (x_R.shape[0], width), (0,))


def down(x_N, height: int):
  """[height, N] of a number a column."""
  return jax.lax.broadcast_in_dim(x_N, (height, x_N.shape[0]), (1,))


def num_cores() -> int:
  """Multiprocessors of the device in use, or of an H100 where there is none."""
  return getattr(jax.devices()[0], "core_count", None) or 132


def check_installed(op: str) -> None:
  try:
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401
  except ImportError as error:
    raise NotImplementedError(f"{op}: no Mosaic GPU in this jax: {error}") from error


def once(*static: str):
  """`jax.jit` of a kernel's call: unrolled layers lower it once, not half a second each."""
  return functools.partial(jax.jit, static_argnames=static)


def options(interpreted: bool) -> dict:
  """Keyword arguments of every `plgpu.kernel`."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  params = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
  )
  return dict(compiler_params=params, interpret=interpret.gpu_params() if interpreted else None)


def as_tile(x_Rn, interpreted: bool):
  """x in the registers of a wgmma's result: a hint where nothing else fixes the layout."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return x_Rn if interpreted else plgpu.layout_cast(x_Rn, plgpu.Layout.WGMMA)


def as_rows(x_R, interpreted: bool):
  """A number a row of `as_tile`."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return x_R if interpreted else plgpu.layout_cast(x_R, plgpu.Layout.WGMMA.reduce(1))


def dot(a_ref, b_ref):
  """a b of two references in shared memory, float32 [rows, columns]. Waits for the result."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def run(acc_ref):
    plgpu.wgmma(acc_ref, a_ref, b_ref)
    return acc_ref[...]

  return pl.run_scoped(run, plgpu.ACC((a_ref.shape[0], b_ref.shape[1]), jnp.float32))


def values_dot_add(acc_Rn, a_Rk, b_ref, interpreted: bool):
  """acc + a b, as `dot`; a comes from the registers that a product leaves its result in.

  On the device the product goes on in the registers of acc: jax 0.10's interpreter has none that
  starts from a value.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if interpreted:
    return acc_Rn + jnp.dot(a_Rk, b_ref[...], preferred_element_type=jnp.float32)
  return pl.run_state(lambda ref: plgpu.wgmma(ref, a_Rk, b_ref))(plgpu.ACC.init(acc_Rn))


def dot_transposed(a_ref, b_ref, interpreted: bool):
  """a b^T, as `dot`; b is a part of an array (`.at`).

  Read and multiplied on the host where the interpreter cannot transpose b.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if interpreted and not interpret.has_transposed_references():
    return jnp.dot(a_ref[...], b_ref[...].T, preferred_element_type=jnp.float32)

  def run(acc_ref):
    plgpu.wgmma(acc_ref, a_ref, b_ref.transpose((1, 0)))
    return acc_ref[...]

  return pl.run_scoped(run, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))


def as_line(x_N, interpreted: bool):
  """x in the registers of `load_line`."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return x_N if interpreted else plgpu.layout_cast(x_N, _line(x_N.shape[0]))


def load_line(ref, index, interpreted: bool):
  """[n] numbers of 32 bits from any place of an array: n a multiple of 128, one thread a number.

  jax 0.10's interpreter has no load with a layout.
  """
  return ref[index] if interpreted else _load(ref, index, _line(index[-1].size))


def _line(length: int):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.Layout.WG_STRIDED((length,), vec_size=1)


def load_bytes(ref, index, interpreted: bool):
  """[64, columns] of 8-bit values in the registers' layout of a product.

  Named, because the search for layouts does not find it; jax 0.10's interpreter has no such load.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return ref[index] if interpreted else _load(ref, index, plgpu.Layout.WGMMA)


def store(ref, index, value, interpreted: bool) -> None:
  """ref[index] = value, in device memory, from the registers of a product.

  jax 0.12 refuses the plain form where a warp's rows do not fill whole sectors.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if interpreted or not hasattr(plgpu, "store"):  # before jax 0.12
    ref[index] = value
  else:
    plgpu.store(ref.at[index], value, optimized=False)


def _load(ref, index, layout):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  options = dict(layout=layout, optimized=False)
  if "idx" in inspect.signature(plgpu.load).parameters:  # before jax 0.12
    return plgpu.load(ref, index, **options)
  return plgpu.load(ref.at[index], **options)
