"""Checkpoints of runs: what is kept, other meshes, damaged and wrong checkpoints, run folders."""

import dataclasses
import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from minicpm_jax import config
from minicpm_jax.ckpt import errors, orbax_io, run_config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import trees
from minicpm_jax.models import transformer, zoo


def small_model(**changes) -> config.ModelConfig:
  return config.ModelConfig(
    vocab_size=64,
    model_dim=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=32,
    **changes,
  )


def tree(seed: int = 0):
  rng = np.random.default_rng(seed)
  return {
    "a": {"kernel": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)},
    "b": jnp.asarray(rng.standard_normal(3), jnp.bfloat16),
  }


def target(params, mesh=None, axes=()):
  mesh = mesh or mesh_lib.make_mesh(config.MeshConfig(dp=1), jax.devices()[:1])
  place = NamedSharding(mesh, PartitionSpec(*axes))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)


def save(store, step, params, tokens=0, **items):
  store.save(step, params=params, meta={"tokens": tokens}, **items)


def assert_equal(a, b):
  a, b = trees.flatten_paths(a), trees.flatten_paths(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.mark.smoke
def test_round_trip_is_bitwise(tmp_path):
  params, tx = tree(), optax.adam(1e-3)
  _, opt_state = tx.update(tree(1), tx.init(params))
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 7, params, tokens=70, opt_state=opt_state, data={"cursor": [1, 2]})
  with orbax_io.CheckpointStore(tmp_path, is_read_only=True) as store:
    assert store.latest_step() == 7 and store.meta(7) == {"step": 7, "tokens": 70}
    assert store.data(7) == {"cursor": [1, 2]}
    assert_equal(store.params(7, target(params)), params)
    assert_equal(store.opt_state(7, target(opt_state)), opt_state)


def test_restore_on_another_mesh(tmp_path):
  params = {"w": jnp.arange(64.0).reshape(8, 8)}
  before = mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=4, tp=2))
  after = mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=2), jax.devices()[:2])
  sharded = jax.device_put(params, NamedSharding(before, PartitionSpec("fsdp", "tp")))
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 1, sharded)
    found = store.params(1, target(params, after, (None, "fsdp")))
  assert_equal(found, params)
  assert found["w"].sharding.spec == PartitionSpec(None, "fsdp")
  assert found["w"].addressable_shards[0].data.shape == (8, 4)


def test_keep_rules(tmp_path):
  """Newest 2, step 20 by name, and the first past 100, 200, ... tokens; also after reopening."""
  cfg = config.CheckpointConfig(
    every_steps=10, keep_last=2, keep_steps=(20, 33), keep_every_tokens=100
  )
  params = tree()
  with orbax_io.CheckpointStore(tmp_path, cfg) as store:
    for step in range(10, 60, 10):
      save(store, step, params, tokens=step * 3)  # 30, 60, 90, 120, 150
  with orbax_io.CheckpointStore(tmp_path, cfg) as store:
    for step in range(60, 100, 10):
      save(store, step, params, tokens=step * 3)  # 180, 210, 240, 270
    store.wait()
    assert store.all_steps() == [20, 40, 70, 80, 90]
    assert [s for s in range(1, 50) if store.is_due(s)] == [10, 20, 30, 33, 40]


def test_saving_a_step_twice_is_one_save(tmp_path):
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 3, tree(0))
    save(store, 3, tree(1))
    assert_equal(store.params(3, target(tree())), tree(0))


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda p: {**p, "a": {"kernel": p["a"]["kernel"].T}}, r"a/kernel: found float32\[8, 4\], exp"),
    (lambda p: {**p, "b": p["b"].astype(jnp.float32)}, r"leaf b: found bfloat16\[3\], expected fl"),
    (lambda p: {**p, "c": p["b"]}, r"leaf c: found none, expected bfloat16\[3\]"),
    (lambda p: {"a": p["a"]}, r"leaf b: found bfloat16\[3\], expected none"),
  ],
  ids=["shape", "dtype", "missing", "unexpected"],
)
def test_a_mismatch_names_the_leaf(tmp_path, change, text):
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 1, tree())
    store.wait()
    with pytest.raises(errors.CheckpointError, match=text):
      store.params(1, target(change(tree())))


def test_a_truncated_checkpoint_is_refused(tmp_path, monkeypatch):
  # tensorstore reads the leaves at the same time; the errors of those nobody asks for any more are
  # reported when their tasks are collected: here and silently, not loudly in some later test.
  monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
  params = {f"layer_{i}": jnp.arange(20000.0) * (i + 1) for i in range(3)}
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 1, params)
  files = [p for p in (tmp_path / "checkpoints/1/params").rglob("*") if p.parent.name == "d"]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  with orbax_io.CheckpointStore(tmp_path, is_read_only=True) as store:
    with pytest.raises(errors.CheckpointError, match=r"1/params: leaf layer_\d cannot be read"):
      store.params(1, target(params))
  gc.collect()


@pytest.mark.parametrize(
  "error", [TypeError("a bug"), RuntimeError("out of memory"), MemoryError()]
)
def test_errors_that_are_not_about_the_files_go_through(tmp_path, monkeypatch, error):
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 1, tree())
  with orbax_io.CheckpointStore(tmp_path, is_read_only=True) as store:

    def restore(*args, **kwargs):
      raise error

    monkeypatch.setattr(store._manager, "restore", restore)
    for read in (lambda: store.params(1, target(tree())), lambda: store.meta(1)):
      with pytest.raises(type(error)) as caught:
        read()
      assert caught.value is error


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_checkpoint_without_a_file_is_refused(tmp_path, name):
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 1, tree())
  (tmp_path / "checkpoints/1/params" / name).unlink()
  with orbax_io.CheckpointStore(tmp_path, is_read_only=True) as store:
    with pytest.raises(errors.CheckpointError, match="1/params"):
      store.params(1, target(tree()))


@pytest.mark.parametrize(
  "name, key, value",
  [
    ("params/_METADATA", "tree_metadata", []),
    ("params/_METADATA", "value_metadata", None),
    ("params/_METADATA", "key_metadata", [1]),
    ("params/_METADATA", "skip_deserialize", True),
    ("_CHECKPOINT_METADATA", "init_timestamp_nsecs", "x"),
    ("_CHECKPOINT_METADATA", "item_handlers", 1),
  ],
)
def test_damaged_metadata_is_refused(tmp_path, name, key, value):
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 1, tree())
  file = tmp_path / "checkpoints/1" / name

  def damaged(x):
    if isinstance(x, dict):
      return {k: value if k == key else damaged(v) for k, v in x.items()}
    return x

  whole = json.loads(file.read_text())
  file.write_text(json.dumps(damaged(whole)))
  assert json.loads(file.read_text()) != whole
  with pytest.raises(errors.CheckpointError, match=f"{tmp_path}/checkpoints.*metadata"):
    with orbax_io.CheckpointStore(tmp_path, is_read_only=True) as store:
      store.params(1, target(tree()))


def test_missing_steps_and_items(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no checkpoints folder"):
    orbax_io.CheckpointStore(tmp_path / "nowhere", is_read_only=True)
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 4, tree())
    store.wait()
    with pytest.raises(errors.CheckpointError, match=r"found steps \[4\], expected 5"):
      store.meta(5)
    with pytest.raises(errors.CheckpointError, match="no item 'optimizer'"):
      store.opt_state(4, target(tree()))


def test_data_of_another_process_count_is_refused(tmp_path):
  with orbax_io.CheckpointStore(tmp_path) as store:
    save(store, 1, tree(), data={"x": 1})
  folder = tmp_path / "checkpoints/1/data"
  (folder / "process_0-of-1.json").rename(folder / "process_0-of-2.json")
  with orbax_io.CheckpointStore(tmp_path, is_read_only=True) as store:
    with pytest.raises(errors.CheckpointError, match="number of processes that saved it"):
      store.data(1)


def test_a_store_that_never_saved_leaves_no_folder(tmp_path):
  with orbax_io.CheckpointStore(tmp_path / "run"):
    pass
  assert not (tmp_path / "run").exists()


# --- Run folders -------------------------------------------------------------------------------


def test_import_and_load_a_run(tmp_path):
  cfg = small_model(mtp=config.MTPConfig())
  params = transformer.init_params(transformer.Transformer(cfg), jax.random.key(0))
  orbax_io.import_params(tmp_path / "run", cfg, params)
  model, found, tok = orbax_io.load_run(tmp_path / "run")
  assert model.cfg == cfg and tok is None
  assert_equal(found, params)
  mesh = mesh_lib.make_mesh(config.MeshConfig(dp=1, fsdp=2, tp=2), jax.devices()[:4])
  _, sharded, _ = orbax_io.load_run(f"{tmp_path / 'run'}@0", mesh=mesh)
  assert_equal(sharded, params)
  kernel = sharded["layers"]["mlp"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  with pytest.raises(errors.CheckpointError, match="a run there already"):
    orbax_io.import_params(tmp_path / "run", cfg, params)
  with pytest.raises(errors.CheckpointError, match=r"found steps \[0\], expected 9"):
    orbax_io.load_run(f"{tmp_path / 'run'}@9")


def test_a_model_that_is_sparse_from_its_first_tokens_on_is_imported(tmp_path):
  """Its run folder says at which multiples documents start: 24 does not divide the default rows."""
  sparse = config.SparseAttentionConfig(
    kernel_size=12,
    kernel_stride=6,
    block_size=24,
    init_blocks=1,
    window_size=24,
    topk=3,
    dense_len=0,
  )
  cfg = small_model(sparse=sparse)
  params = transformer.init_params(transformer.Transformer(cfg), jax.random.key(0))
  orbax_io.import_params(tmp_path / "run", cfg, params)
  assert orbax_io.load_run(tmp_path / "run")[0].cfg == cfg


def test_split_step():
  assert run_config.split_step("runs/a@12") == (pathlib.Path("runs/a"), 12)
  assert run_config.split_step("runs/me@home") == (pathlib.Path("runs/me@home"), None)


@pytest.mark.smoke
@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_config_file_reads_back_without_running_it(tmp_path, name):
  cfg = config.TrainConfig(
    model=zoo.ZOO[name](),
    data=config.DataConfig(
      sources=(config.SourceConfig(name="a", path="x"),),
      phases=(config.PhaseConfig(weights=(("a", 1.0),)),),
    ),
    profile_steps=(1, 2),
  )
  run_config.write(tmp_path, cfg, header='a """quoted""" note \\')
  assert run_config.read(tmp_path) == cfg


@pytest.mark.parametrize(
  "body, text",
  [
    ("__import__('os').system('true')", "expected a literal or config.SomeConfig"),
    ("config.TrainConfig(model=open('x'))", 'line 2: found "open'),
    ("config.override.ast", "expected a literal"),
    ("config.MeshConfig(no_such=1)", "no_such"),
    ("config.MeshConfig(dp=0)", "mesh.dp: found 0"),
  ],
)
def test_config_file_with_anything_else_is_refused(tmp_path, body, text):
  (tmp_path / "config.py").write_text(f"def get_config(arg=''):\n  return {body}\n")
  with pytest.raises(ValueError, match=text):
    run_config.read(tmp_path)


def test_config_differences_are_dotted():
  a = config.TrainConfig(model=small_model())
  b = dataclasses.replace(
    a, optim=config.OptimConfig(peak_lr=0.5), model=dataclasses.replace(a.model, num_layers=3)
  )
  assert run_config.differences(a, b) == {
    "model.num_layers": (2, 3),
    "optim.peak_lr": (0.01, 0.5),
  }
  moe = dataclasses.replace(a, model=dataclasses.replace(a.model, moe=config.MoEConfig()))
  assert run_config.differences(a, moe) == {"model.moe": (None, config.MoEConfig())}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no config.py, expected the folder of a training run"):
    orbax_io.load_run(tmp_path)
  (tmp_path / "config.py").write_text(json.dumps({}))
  with pytest.raises(ValueError, match="no get_config"):
    orbax_io.load_run(tmp_path)
  run_config.write(tmp_path, small_model())
  with pytest.raises(ValueError, match="config.py: found ModelConfig, expected Train"):
    orbax_io.load_run(tmp_path)


@pytest.mark.parametrize(
  "text, message",
  [
    (b"\xff\xfe", "is not Python"),
    (b"def get_config():\n  return 1\n", "get_config: found 1, expected a config"),
    (b"def get_config():\n  return -'a'\n", "line 2: found"),
    (b"def get_config():\n  return config.MeshConfig(dp=0)\n", r"line 2: mesh\.dp: found 0"),
  ],
)
def test_a_config_file_that_is_none_is_named(tmp_path, text, message):
  (tmp_path / "config.py").write_bytes(text)
  with pytest.raises(ValueError, match=rf"config\.py: {message}"):
    run_config.read(tmp_path)
