"""Compiles the programs of the tests in FILES to machine code for an H100, without one.

`make mosaic-compile` (installs jax's CUDA compiler, 130 MB, beside .venv; ptxas comes with triton).
Prints registers and spills of each kernel; fails on spills beyond SPILLS. [name ...]
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

FILES = ("test_mosaic_gpu.py", "test_mosaic_gemm.py")
SPILLS = {  # bytes
  # Two accumulators beside the sums of 256 keys, so that a product runs under exponentials.
  "sparse_topk_scores_mosaic_gpu_kernel": 320,
  # Two numbers, in the few blocks whose positions are compared.
  "sparse_attention_backward_q_mosaic_gpu_kernel": 8,
}
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_one(name: str) -> None:
  """In a process of its own: the compiler writes to the standard streams."""
  import jax
  import numpy as np
  from jax.experimental import topologies

  path = next(pathlib.Path(__file__).with_name(f) for f in FILES if name in names(f))
  spec = importlib.util.spec_from_file_location(path.stem, path)
  programs = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(programs)
  run, avals = programs.PROGRAMS[name]()
  devices = topologies.get_topology_desc(
    platform="cuda", target_config=TARGET, topology="1x1x1"
  ).devices
  mesh = jax.sharding.Mesh(np.array(devices), ("d",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in avals]
  temporary = jax.jit(run).lower(*avals).compile().memory_analysis().temp_size_in_bytes
  print(f"temporaries {temporary}")


def names(file: str) -> list[str]:
  """Programs of a test file, read without importing it."""
  text = pathlib.Path(__file__).with_name(file).read_text()
  table = text[text.index("PROGRAMS = {") :]
  return re.findall(r'^  "(\w+)": ', table[: table.index("\n}")], flags=re.MULTILINE)


def main(*chosen: str) -> int:
  import triton

  tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
  environment = dict(
    os.environ,
    PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
    JAX_PLATFORMS="cpu",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    MOSAIC_GPU_DUMP_PTXAS="1",
  )
  num_failed = 0
  for name in chosen or [n for file in FILES for n in names(file)]:
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    kernels = re.findall(
      r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", text, re.DOTALL
    )
    memory = re.search(r"temporaries (\d+)", text)
    is_good = (
      done.returncode == 0
      and memory
      and kernels
      and all(int(spilled) <= SPILLS.get(kernel, 0) for kernel, spilled, _ in kernels)
    )
    num_failed += not is_good
    for kernel, spills, registers in kernels:
      print(f"{name}: {kernel} {registers} registers, {spills} bytes spilled", flush=True)
    if memory:
      print(f"{name}: {int(memory[1]) / 2**20:.1f} MiB of temporaries", flush=True)
    if not is_good:
      print(f"{name}: FAILED\n{text[-3000:]}", flush=True)
  return num_failed


if __name__ == "__main__":
  if sys.argv[1:2] == ["--one"]:
    compile_one(sys.argv[2])
  else:
    sys.exit(main(*sys.argv[1:]))
