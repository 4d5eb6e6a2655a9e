"""Compiles the TPU programs of test_mosaic_tpu.py for a real chip, without one: `make tpu-compile`.

Needs libtpu (480 MB), found through TPU_LIBRARY_PATH. Prints compile time and temporary memory.
"""

import importlib.util
import os
import pathlib
import sys
import time

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import topologies


def main(topology: str = "v5e:2x2") -> int:
  path = pathlib.Path(__file__).with_name("test_mosaic_tpu.py")
  spec = importlib.util.spec_from_file_location("test_mosaic_tpu", path)
  programs = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(programs)
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = jax.sharding.Mesh(np.array(devices)[:1], ("d",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  num_failed = 0
  for op, make in programs.PROGRAMS.items():
    for num_heads, head_dim in ((16, 64), (32, 128)):
      run, avals = make(num_heads, head_dim)
      avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in avals]
      start = time.perf_counter()
      try:
        with jax.set_mesh(mesh):
          compiled = jax.jit(run).lower(*avals).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        result = f"{time.perf_counter() - start:.1f} s, {temporary:.1f} MiB of temporaries"
      except Exception as error:
        num_failed += 1
        result = f"FAILED: {str(error)[:1000]}"
      print(f"{topology} {op} {num_heads} heads of {head_dim}: {result}", flush=True)
  return num_failed


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
