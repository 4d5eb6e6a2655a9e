"""Launching Triton kernels through jax-triton, and what a CUDA backend must check first.

Every op's `triton.py` starts its kernels with `launch`; `triton_kernels.py` holds their bodies.
jax-triton has no batching rule, no gradient and no CPU interpreter: kernels carry the batch axis,
gradients come from the op's `vjp.py`, values are tested by a process of its own that replaces
`launch` (tests/pallas_kernels/triton_host.py).
"""

import functools
import importlib
import inspect

import jax
from jax.extend.mlir import ir
from jax.interpreters import mlir, partial_eval

# jaxlib's handler of a Triton kernel that XLA records into CUDA graphs. jax-triton 0.3 calls the
# older one, "triton_kernel_call": there the host launches it and whatever lies between two of them.
TARGET = "triton_kernel_call_ffi"
FLOATS = ("bfloat16", "float16", "float32")


def capability(named: int | None) -> int | None:
  """80, 90, ...: the one named in a config, else that of the device in use; None without one."""
  if named is None and jax.default_backend() == "gpu":
    found = str(getattr(jax.devices()[0], "compute_capability", ""))
    return round(10 * float(found)) if found.replace(".", "").isdigit() else None  # ROCm: gfx942
  return named


def check_cuda(
  op: str, compute_capability: int | None, *, least: int = 80, reason: str | None = None
) -> None:
  """Raises NotImplementedError unless a kernel can be compiled for the device in use.

  `compute_capability` (80, 90, ...) named in a config lowers for that device from any machine.
  `least` is the first that serves the op, and `reason` says why.
  """
  found = capability(compute_capability)
  if found is None:
    raise NotImplementedError(
      f"{op}: triton needs a CUDA device, the default backend is {jax.default_backend()}"
    )
  if found < least:
    why = f" ({reason})" if reason else ""
    raise NotImplementedError(
      f"{op}: triton needs compute capability {least / 10}, found {found / 10}{why}"
    )
  try:
    importlib.import_module("jax_triton")
  except ImportError as error:
    raise NotImplementedError(f"{op}: {error} (pip install minicpm_jax[gpu])") from error


def has_triton() -> bool:
  """Whether jax-triton can be imported: it may be installed without jax's CUDA plugin."""
  try:
    importlib.import_module("jax_triton")
  except ImportError:
    return False
  return True


def check_arrays(op: str, **arrays) -> None:
  """Raises NotImplementedError unless all share one float type that the kernels serve."""
  found = {name: str(x.dtype) for name, x in arrays.items()}
  if len(set(found.values())) != 1 or next(iter(found.values())) not in FLOATS:
    raise NotImplementedError(f"{op}: found types {found}, expected one of {FLOATS} for all")


def require_power_of_two(op: str, **sizes: int) -> None:
  for name, size in sizes.items():
    if size < 1 or size & (size - 1):
      raise NotImplementedError(f"{op}: {name} = {size}, expected a power of two")


def check_tiles(config, **least: int) -> None:
  """ValueError naming the field of a kernel config that is below its `least` or no power of two."""
  for name, low in least.items():
    value = getattr(config, name)
    if value < low or value & (value - 1):
      field = f"{type(config).__name__}.{name}"
      raise ValueError(f"{field}: found {value}, expected a power of two, at least {low}")


def next_power_of_two(n: int, *, least: int = 1) -> int:
  return max(least, 1 << max(n - 1, 0).bit_length())


def precision(dtype) -> str:
  """Matmul inputs as they are: float32 is not rounded to TF32."""
  return "ieee" if str(dtype) == "float32" else "tf32"


def launch(
  kernel, *arrays, out_shape, grid, num_warps, num_stages, compute_capability=None, **sizes
):
  """Runs a `triton.jit` function on the arrays, then the outputs, then constants by name."""
  jax_triton = importlib.import_module("jax_triton")
  _mend_dead_code_rule()
  known = inspect.signature(jax_triton.triton_call).parameters
  if "custom_call_target_name" in known:
    _lower_to_target()
    sizes["custom_call_target_name"] = TARGET
  sizes["out_type" if "out_type" in known else "out_shape"] = out_shape  # 0.4; 0.3
  return jax_triton.triton_call(
    *arrays,
    kernel=kernel,
    grid=grid,
    num_warps=num_warps,
    num_stages=num_stages,
    compute_capability=compute_capability,
    **sizes,
  )


@functools.cache
def _mend_dead_code_rule() -> None:
  """jax 0.12 gives such rules three arguments; that of jax-triton 0.4.1, its newest, takes two."""
  lib = importlib.import_module("jax_triton.triton_lib")
  rule = partial_eval.dce_rules.get(lib.triton_kernel_call_p)
  if rule is not None and len(inspect.signature(rule).parameters) == 2:
    partial_eval.dce_rules[lib.triton_kernel_call_p] = lambda used, *rest: rule(used, rest[-1])


@functools.cache
def _lower_to_target() -> None:
  """Has jax-triton's calls of TARGET lowered as typed FFI, which is what that handler reads."""
  lib = importlib.import_module("jax_triton.triton_lib")

  def lower(ctx, *args, **params):
    values = lib.triton_kernel_call_lowering(lib.get_cuda_backend, ctx, *args, **params)
    if params["custom_call_target_name"].endswith("_ffi"):
      attributes = ir.OpResult(values[0]).owner.attributes
      kernel = attributes["backend_config"]
      attributes["backend_config"] = ir.DictAttr.get({"opaque": kernel})
      attributes["api_version"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4)
    return values

  mlir.register_lowering(lib.triton_kernel_call_p, lower, platform="cuda")
