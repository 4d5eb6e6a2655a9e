"""Mesh sizes, logical rules, refusals that name the tensor; on 8 host devices."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib


def make(**sizes):
  return mesh_lib.make_mesh(config.MeshConfig(**{"dp": 1, **sizes}), jax.devices()[:8])


def boxed(shape, *names):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.smoke
@pytest.mark.parametrize(
  "sizes, shape",
  [
    (dict(dp=-1), (8, 1, 1, 1, 1, 1)),
    (dict(dp=2, fsdp=-1, tp=2), (2, 2, 1, 2, 1, 1)),
    (dict(fsdp=2, ep=2, cp=2), (1, 2, 2, 1, 2, 1)),
  ],
)
def test_mesh_has_six_auto_axes(sizes, shape):
  mesh = make(**sizes)
  assert mesh.axis_names == ("dp", "fsdp", "ep", "tp", "cp", "pp")
  assert mesh.devices.shape == shape
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [dict(dp=3), dict(dp=-1, tp=3), dict(fsdp=4)])
def test_a_mesh_that_does_not_fit_the_devices_says_both_numbers(sizes):
  with pytest.raises(mesh_lib.ShardingError, match=r"mesh: found .*, expected .*8"):
    make(**sizes)


@pytest.mark.parametrize(
  "names, spec",
  [
    (("embed", "heads", "head_dim"), P("fsdp", "tp", None)),
    (("layers", "embed", "kv_heads", "head_dim"), P(None, "fsdp", "tp", None)),
    (("layers", "mlp", "embed"), P(None, "tp", "fsdp")),
    (("vocab", "embed"), P("tp", "fsdp")),
    (("expert", "embed", "mlp"), P("ep", "fsdp", "tp")),
    (("embed", "lora"), P("fsdp", None)),  # an axis serves the first dimension that asks
    (("lora", "heads", "head_dim"), P("fsdp", "tp", None)),
    (("act_batch", "act_seq", "act_embed"), P(("fsdp", "ep"), None, None)),
    (("act_expert", "act_batch", "act_mlp"), P("ep", "fsdp", "tp")),
  ],
)
def test_rules(names, spec):
  assert mesh_lib.sharding(make(fsdp=2, ep=2, tp=2), names).spec == spec


def test_tree_shardings_of_boxes_and_of_specs_agree():
  mesh = make(fsdp=2, tp=4)
  tree = {"q": {"kernel": boxed((8, 4, 16), "embed", "heads", "head_dim")}, "free": jnp.ones(3)}
  want = {"q": {"kernel": P("fsdp", "tp", None)}, "free": P()}
  from_boxes = mesh_lib.tree_shardings(mesh, tree)
  from_specs = mesh_lib.tree_shardings(mesh, nn.get_partition_spec(tree), nn.unbox(tree))
  assert jax.tree.map(lambda s: s.spec, from_boxes) == want
  assert from_specs["q"]["kernel"].spec == want["q"]["kernel"]
  assert from_specs["free"].is_fully_replicated


def test_an_uneven_parameter_is_refused_by_name():
  tree = {"layers": {"mlp": {"up": {"kernel": boxed((2, 8, 10), "layers", "embed", "mlp")}}}}
  with pytest.raises(mesh_lib.ShardingError, match=r"layers/mlp/up/kernel.*\(mlp\).*10.*4.*tp 4"):
    mesh_lib.tree_shardings(make(dp=2, tp=4), tree)
  with pytest.raises(mesh_lib.ShardingError, match="logical axis 'mpl'"):
    mesh_lib.tree_shardings(make(dp=-1), {"w": boxed((8,), "mpl")})


@pytest.mark.parametrize("kv_heads, axis", [(2, None), (4, "tp"), (8, "tp")])
def test_few_kv_heads_are_replicated_over_tp(kv_heads, axis):
  tree = {"k": boxed((8, kv_heads, 16), "embed", "kv_heads", "head_dim")}
  found = mesh_lib.tree_shardings(make(dp=2, tp=4), tree)["k"].spec
  assert found == P(None, axis, None)


@pytest.mark.smoke
def test_constrain_follows_the_context_mesh_and_leaves_uneven_dims_whole():
  f = jax.jit(lambda x: mesh_lib.constrain(x * 2, "act_batch", "act_seq", "act_embed"))
  x = jnp.ones((4, 8, 3))
  assert len(f(x).sharding.device_set) == 1
  mesh = make(fsdp=4, cp=2)
  with jax.set_mesh(mesh):
    even, one_row = f(x), f(x[:1])
  assert even.sharding.is_equivalent_to(mesh_lib.sharding(mesh, ("act_batch", "act_seq", None)), 3)
  assert one_row.sharding.is_equivalent_to(mesh_lib.sharding(mesh, (None, "act_seq", None)), 3)
  np.testing.assert_array_equal(even, 2 * x)


def test_shard_batch_places_rows_and_check_batch_refuses():
  mesh = make(dp=2, fsdp=2, cp=2)
  batch = {"tokens": np.arange(32, dtype=np.int32).reshape(4, 8)}
  placed = mesh_lib.shard_batch(mesh, batch)["tokens"]
  np.testing.assert_array_equal(placed, batch["tokens"])
  assert {s.data.shape for s in placed.addressable_shards} == {(1, 4)}
  mesh_lib.check_batch(mesh, batch_size=8, seq_len=8, grad_accum=2)
  with pytest.raises(mesh_lib.ShardingError, match=r"data\.batch_size: found 12 .* multiple of 4"):
    mesh_lib.check_batch(mesh, batch_size=12, seq_len=8, grad_accum=2)
  with pytest.raises(mesh_lib.ShardingError, match=r"data\.seq_len: found 9"):
    mesh_lib.check_batch(mesh, batch_size=4, seq_len=9)


@pytest.mark.parametrize(
  "process_rows, want",
  [
    ({0: [0, 1], 1: [2, 3]}, (0, 2)),
    ({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, (0, 1)),  # tp across processes: both load all rows
    ({0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}, (0, 2)),
    ({0: [0, 1], 1: [1, 2], 2: [2, 3]}, None),
  ],
)
def test_data_process_groups_processes_by_the_rows_they_hold(monkeypatch, process_rows, want):
  mesh = make(dp=4, tp=2)

  class Device:
    def __init__(self, process_index):
      self.process_index = process_index

  pairs = [(process, row) for process, rows in process_rows.items() for row in rows]
  index_map = {Device(p): (slice(r, r + 1), slice(None)) for p, r in pairs}
  place = types.SimpleNamespace(devices_indices_map=lambda shape: index_map)
  monkeypatch.setattr(mesh_lib, "batch_sharding", lambda mesh: place)
  if want is None:
    with pytest.raises(mesh_lib.ShardingError, match="row shards"):
      mesh_lib.data_process(mesh)
  else:
    assert mesh_lib.data_process(mesh) == want


def test_initialize_distributed_refuses_half_an_address(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  with pytest.raises(ValueError, match="coordinator"):
    mesh_lib.initialize_distributed(num_processes=2, process_id=0)
  with pytest.raises(ValueError, match="num_processes, process_id"):
    mesh_lib.initialize_distributed("localhost:1", num_processes=2)
  assert calls == []
  mesh_lib.initialize_distributed()
  mesh_lib.initialize_distributed("localhost:1", 2, 0)
  assert calls[0][0] == (None,)
  assert calls[1] == (("localhost:1",), {"num_processes": 2, "process_id": 0})
