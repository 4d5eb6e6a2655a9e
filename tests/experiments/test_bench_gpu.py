"""The suite for one GPU, on a CPU in a tiny shape: what is accepted, what a failure leaves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _bench_gpu, _forced, bench_decode
from minicpm_jax.infer import tree as tree_lib
from minicpm_jax.infer.drafters import base
from minicpm_jax.models import transformer
from minicpm_jax.nn import sparse_attention
from minicpm_jax.quant import qtensor


def run(tmp_path, *flags):
  status = bench_decode.main(
    ["bench_decode", "--suite=gpu", "--shape=tiny", f"--output={tmp_path}", *flags]
  )
  return status, json.loads((tmp_path / "bench_decode_gpu_tiny.json").read_text())


def test_plain_steps_and_what_they_read(tmp_path):
  status, found = run(tmp_path, "--parts=plain", "--weights=bf16")
  assert status == 0 and not found["errors"]
  (row,) = [row for row in found["rows"] if row["part"] == "bf16 plain"]
  D, F, N, K, H, V, L = 64, 128, 4, 2, 16, 160, 2
  numbers = L * (D * (N + 2 * K) * H + N * H * D + 3 * D * F + 2 * D) + D + D * V
  numbers += 2 * L * 64 * K * H  # keys and values of 64 tokens
  assert row["GB a step"] == pytest.approx(4 * numbers / 1e9, rel=1e-6)
  assert row["context"] == 64 and row["tokens/s"] == pytest.approx(1e3 / row["ms"])


@pytest.mark.slow
def test_forced_acceptance_is_what_the_engine_accepts(tmp_path):
  status, found = run(tmp_path, "--parts=verify,spec,draft,engine,long", "--weights=bf16,int4")
  assert status == 0
  for kind in ("bf16", "int4"):
    spec = [row for row in found["rows"] if row["part"] == f"{kind} spec 2/10/12"]
    assert {row["accept"]: row["tokens a round"] for row in spec} == {
      "1": 1.0,
      "2": 2.0,
      "2.5": 2.5,
      "3": 3.0,
    }
  (row,) = [row for row in found["rows"] if row["part"] == "bf16 engine"]
  assert row["tokens as foreseen"]


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
  def broken(self):
    raise RuntimeError("no such kernel")

  monkeypatch.setattr(_bench_gpu.Program, "compile", broken)
  status, found = run(tmp_path, "--parts=plain", "--weights=bf16")
  assert status == 1
  assert {e["part"] for e in found["errors"]} == {
    "bf16 plain (compile)",
    "bf16 plain, 16 a dispatch (compile)",
  }
  assert found["errors"][0]["error"] == "RuntimeError: no such kernel"
  assert "FAILED bf16 plain (compile)" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "text"),
  [
    ("--parts=plain,fast", "--parts: found ['fast']"),
    ("--nodes=12,many", "--nodes: found ['many']"),
    ("--contexts=many", "--contexts: found ['many']"),
    ("--weights=int5", "--weights: found ['int5']"),
    ("--shape=huge", "--shape: found 'huge'"),
  ],
)
def test_bad_flags_are_named(flag, text, capsys):
  assert bench_decode.main(["bench_decode", "--suite=gpu", flag]) == 1
  assert text in capsys.readouterr().err


def test_compile_only_times_nothing(tmp_path):
  flags = ("--parts=verify", "--nodes=4", "--weights=bf16", "--compile_only")
  status, found = run(tmp_path, *flags)
  assert status == 0 and [row["part"] for row in found["rows"]] == ["weights", "compile"]
  assert found["rows"][1]["programs"] == 1


@pytest.mark.slow
def test_a_chunk_behind_a_context_is_timed_in_the_kind_asked_for(tmp_path):
  flags = ("--parts=chunk", "--contexts=192", "--weights=int4")
  status, found = run(tmp_path, *flags)
  assert status == 0 and not found["errors"]
  rows = {row["part"]: row for row in found["rows"][2:]}
  assert set(rows) == {"int4 chunk sparse 192", "int4 chunk dense 192"}
  for row in rows.values():  # chunks of 64 tokens
    assert row["prefill tokens/s"] == pytest.approx(64e3 / row["ms"])


def test_a_chunk_is_the_prompts_last_tokens():
  size = _bench_gpu.sizes("tiny")
  cfg, params, _, _ = _bench_gpu.weights(size, "bf16")
  chunk = _bench_gpu.Chunk(size, cfg, base.Params(params, ()), 192)
  state = chunk._context(chunk.params)
  assert state.cache.length.tolist() == [128]
  chunk.compile()
  state, _ = chunk.run(chunk.params, state, *chunk._args)
  assert state.cache.length.tolist() == [192]


def test_a_draft_with_fr_scores_a_quarter_of_the_head():
  size = _bench_gpu.sizes("tiny")
  _, target, _, draft = _bench_gpu.weights(size, "bf16")
  draft = _bench_gpu.with_fr(base.Params(target, draft), size.model.vocab_size).draft
  ids = np.asarray(draft["ids_R"])
  assert ids.size == 40 and (np.diff(ids) > 0).all()
  head = np.asarray(target["lm_head"]["kernel"])
  np.testing.assert_array_equal(draft["head_DR"], np.take(head, ids, axis=1))


@pytest.mark.parametrize("want", [1, 2, 3])
def test_forced_trees_are_accepted_as_far_as_wanted(want):
  """Verification's own rule on a target that says t + 1; two nodes were right by chance."""
  parent, depth = [0, 0, 0, 1, 2], [0, 1, 1, 2, 2]
  tree = base.Tree(
    tok_BP=jnp.array([[9, 0, 4, 7, 1]], jnp.int32),  # vocabulary 10: after 9 comes 0, then 1
    parent_BP=jnp.array([parent], jnp.int32),
    depth_BP=jnp.array([depth], jnp.int32),
    anc_BPP=tree_lib.ancestors(jnp.array(parent, jnp.int32), 2)[None],
  )
  tree = _forced.forced(tree, jnp.array([want], jnp.int32), 10)
  says_BP = (jnp.maximum(tree.tok_BP, 0) + 1) % 10
  acc, _, new = tree_lib.match(tree, says_BP, 2)
  assert int(acc[0]) == want
  assert np.asarray(new)[0, :want].tolist() == [0, 1, 2][:want]


def test_contexts_hold_the_compressed_keys_of_their_keys():
  size = _bench_gpu.sizes("tiny")
  model = transformer.Transformer(size.model)
  params = base.Params({}, ())
  cache = _bench_gpu.context(model, base.NoDrafter(), params, 200, 256).cache
  assert cache.length.tolist() == [200]
  for level, k in (("fine", cache.k[1]), ("coarse", cache.k[1])):
    expected = sparse_attention.compress(k, size.model.sparse, level)
    found = getattr(cache, level)[1][:, : expected.shape[1]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_say_the_next_token_in_every_kind():
  for kind in ("bf16", "int4"):
    cfg, params, _, _ = _bench_gpu.weights(_bench_gpu.sizes("tiny"), kind)
    kernel = params["layers_0"]["mlp"]["gate_up"]["kernel"]
    assert qtensor.is_qtensor(kernel) == (kind != "bf16")
    tokens = np.arange(40, 60, dtype=np.int32)[None]
    logits = jax.jit(transformer.Transformer(_bench_gpu.dense(cfg)).apply)(
      {"params": params}, tokens
    ).logits
    assert np.asarray(logits).argmax(-1).tolist() == (tokens + 1).tolist()
    top = np.sort(np.asarray(logits), axis=-1)
    assert (top[..., -1] - top[..., -2]).min() > 0.2  # far more than rounding
