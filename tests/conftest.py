"""Test set-up: CPU with 8 host devices, runtime shape checks, absl flags parsed."""

import gc
import importlib.metadata
import os
import sys


def _wants_hardware(argv: list[str]) -> bool:
  for flag, value in zip(argv, argv[1:], strict=False):
    if flag == "-m" and value.strip() in ("gpu", "tpu"):
      return True
  return False


if not _wants_hardware(sys.argv):
  os.environ["JAX_PLATFORMS"] = "cpu"
  # Tests compile far more than they compute: without LLVM optimisation they take a third less time,
  # and XLA's older code generator (jaxlib 0.10 has both) compiles in half that of the new one,
  # which the notebooks and the smoke tests run with.
  wanted = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    wanted |= {"--xla_cpu_use_fusion_emitters": "false"}
    wanted |= {"--xla_cpu_parallel_codegen_split_count": 1}
  for flag, value in wanted.items():
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
      os.environ["XLA_FLAGS"] = f"{flags} {flag}={value}".strip()
# Tracing makes millions of objects that live: with Python's thresholds a tenth of the time is gc.
gc.set_threshold(100_000, 20, 20)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("minicpm_jax", "beartype.beartype")

import jax  # noqa: E402
from absl import flags as absl_flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# References are float32: GPUs and TPUs would round their products to fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")
absl_flags.FLAGS.mark_as_parsed()

import pathlib  # noqa: E402

import pytest  # noqa: E402

_MANY_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
  """Drops compiled programs behind a module once they are many.

  On a CPU a program is at least three memory mappings, of which Linux allows a process 65,530
  (vm.max_map_count); XLA aborts beyond that.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPPINGS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
  """The folder of real data beside the checkout (MINICPM_JAX_SHARED or ../shared), or a skip."""
  root = os.environ.get("MINICPM_JAX_SHARED") or pathlib.Path(__file__).parents[2] / "shared"
  path = pathlib.Path(root)
  if not path.is_dir():
    pytest.skip(f"no shared data: {path} is missing (set MINICPM_JAX_SHARED)")
  return path
