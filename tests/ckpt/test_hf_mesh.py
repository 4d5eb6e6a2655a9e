"""Loading onto a mesh: born sharded, padded vocabulary, and the memory that streaming needs."""

import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import hf_io
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from tests.ckpt import hf_folder

HF = hf_folder.UNTIED | {"vocab_size": 97}  # odd, as 122753


@pytest.fixture(scope="module")
def mesh():
  return mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=4, tp=2))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stacked", "unrolled"])
def test_born_sharded_equals_unsharded(tmp_path, mesh, scan_layers):
  weights = hf_folder.tensors(HF)
  hf_folder.write(tmp_path / "in", HF, weights, num_shards=2)
  _, plain, _ = ckpt.load_hf(tmp_path / "in", scan_layers=scan_layers)
  model, params, _ = ckpt.load_hf(tmp_path / "in", mesh=mesh, scan_layers=scan_layers)
  assert model.cfg.padded_vocab_size == 98 and model.cfg.vocab_size == 97
  plain, sharded = trees.flatten_paths(plain), trees.flatten_paths(params)
  assert set(plain) == set(sharded)
  for path, leaf in sharded.items():
    whole, want = np.asarray(leaf), np.asarray(plain[path])
    if path in ("embed/embedding", "lm_head/kernel"):
      axis = path != "embed/embedding"
      rows = np.moveaxis(whole, int(axis), 0)
      assert rows.shape[0] == 98 and not rows[97:].any()
      whole = np.moveaxis(rows[:97], 0, int(axis))
    np.testing.assert_array_equal(whole, want)
    if leaf.ndim > (2 if scan_layers else 1):  # a matrix: no device holds all of it
      assert len(leaf.sharding.device_set) == 8
      assert max(s.data.nbytes for s in leaf.addressable_shards) <= leaf.nbytes // 4, path
  ckpt.save_hf(tmp_path / "out", model, params)
  written = hf_folder.read(tmp_path / "out")
  assert set(written) == set(weights)
  assert all(hf_folder.same_bits(written[n], weights[n]) for n in weights)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 97


def test_sharded_logits_are_the_unsharded_ones(tmp_path, mesh):
  hf_folder.write(tmp_path, HF, hf_folder.tensors(HF))
  tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, 8)), jnp.int32)
  model, params, _ = ckpt.load_hf(tmp_path)
  want = jax.jit(model.apply)({"params": params}, tokens_BT).logits
  model, params, _ = ckpt.load_hf(tmp_path, mesh=mesh)
  with jax.set_mesh(mesh):
    got = jax.jit(model.apply)({"params": params}, tokens_BT).logits
  assert got.shape == (4, 8, 97)
  np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=1e-5)


def test_experts_over_the_expert_axis(tmp_path):
  mesh = mesh_lib.make_mesh(config.MeshConfig(dp=1, ep=4, tp=2))
  weights = hf_folder.tensors(hf_folder.MOE)
  model, params, _ = ckpt.load_hf(hf_folder.write(tmp_path, hf_folder.MOE, weights), mesh=mesh)
  gate_LEDF = params["layers"]["moe"]["gate"]["kernel"]
  for shard in gate_LEDF.addressable_shards:
    assert shard.data.shape == (2, 1, 32, 24)
    e, f = shard.index[1].start or 0, shard.index[3]
    want = weights[f"model.layers.1.mlp.experts.{e}.w1.weight"].T[:, f]
    np.testing.assert_array_equal(np.asarray(shard.data)[1, 0], want)


@pytest.mark.parametrize("at", [(), (1,), (1, 2)])
def test_the_accelerators_way_to_one_block(at):
  """On a GPU or across processes a block is cut on the devices; here it must be the same cut."""
  x_LEF = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)
  got = hf_io._index(jnp.asarray(x_LEF), np.asarray(at, np.int32))
  np.testing.assert_array_equal(np.asarray(got), x_LEF[at])


_MEASURE = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
flag = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = flag if sys.argv[2] == "mesh" else ""
import jax
from minicpm_jax import ckpt, config
from minicpm_jax.ckpt import hf_config, hf_io, hf_tensors
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.models import transformer, zoo
mesh = None
if sys.argv[2] == "mesh":
  mesh = mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=4, tp=2))
transformer.abstract_params(transformer.Transformer(zoo.tiny(zoo.minicpm4_8b())))
jax.block_until_ready(jax.numpy.ones(8) + 1)
def memory(field):
  line = next(x for x in open("/proc/self/status") if x.startswith(field))
  return int(line.split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = memory("VmRSS")
model, params, _ = ckpt.load_hf(sys.argv[1], mesh=mesh)
loaded = memory("VmHWM")
ckpt.save_hf(sys.argv[1] + "-out", model, params, max_shard_bytes=30e6)
print(before, loaded, memory("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "mesh"])
def test_peak_host_memory_is_below_model_plus_largest_shard(tmp_path, kind):
  """A 200 MB model in shards of about 25 MB, loaded and saved in a process of its own."""
  hf = hf_folder.UNTIED | {"torch_dtype": "bfloat16", "hidden_size": 768, "vocab_size": 8000}
  hf |= {"intermediate_size": 3072, "num_hidden_layers": 10, "num_attention_heads": 12}
  weights = hf_folder.tensors(hf)
  size = sum(x.nbytes for x in weights.values())
  assert 1.9e8 < size < 2.2e8
  hf_folder.write(tmp_path / "in", hf, weights, num_shards=8)
  largest = max(p.stat().st_size for p in (tmp_path / "in").glob("*.safetensors"))
  run = subprocess.run(
    [sys.executable, "-c", _MEASURE, str(tmp_path / "in"), kind],
    capture_output=True, text=True, check=True, timeout=300,
  )  # fmt: skip
  before, loaded, saved = map(int, run.stdout.split()[-3:])
  report = f"size {size / 1e6:.0f} MB, largest shard {largest / 1e6:.0f} MB, " + (
    f"load +{(loaded - before) / 1e6:.0f} MB, load and save +{(saved - before) / 1e6:.0f} MB"
  )
  print(report)
  assert loaded - before < size + largest, report
  assert saved - before < size + largest, report


_PROCESS = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
port, index, folder, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
from minicpm_jax import ckpt, config
from minicpm_jax.core import mesh as mesh_lib
mesh = mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=2, tp=2))
model, params, _ = ckpt.load_hf(folder, mesh=mesh)
assert not params["layers"]["mlp"]["gate"]["kernel"].is_fully_addressable
ckpt.save_hf(out, model, params, max_shard_bytes=20_000)
"""


@pytest.mark.slow
def test_two_processes_load_their_slices_and_write_one_folder(tmp_path):
  """Mixed dtypes, so that the order in which the processes gather differs from the file order."""
  weights = hf_folder.tensors(HF | {"torch_dtype": "bfloat16"})
  weights = {n: x.astype(np.float32) if x.ndim == 1 else x for n, x in weights.items()}
  hf_folder.write(tmp_path / "in", HF, weights)
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = str(s.getsockname()[1])
  folders = [str(tmp_path / "in"), str(tmp_path / "out")]
  runs = [
    subprocess.Popen([sys.executable, "-c", _PROCESS, port, str(i), *folders]) for i in range(2)
  ]
  assert [run.wait(timeout=240) for run in runs] == [0, 0]
  written = hf_folder.read(tmp_path / "out")
  assert set(written) == set(weights)
  assert all(hf_folder.same_bits(written[n], weights[n]) for n in weights)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
