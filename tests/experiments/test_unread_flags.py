"""A flag that the chosen suite, draft or file does not read is one line that names both."""

import jax
import numpy as np
import pytest

from experiments import (
  _bench_decode,
  _bench_drafts,
  _bench_mfu,
  _command,
  _infer,
  _regenerate,
  bench_decode,
  bench_drafts,
  bench_train,
  generate,
  serve,
  tune_tree,
)
from minicpm_jax import ckpt, config
from minicpm_jax.data import documents, shards
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer, zoo
from tests.models import common

GPU = "bench_decode --suite=gpu"


@pytest.mark.parametrize(
  "command, flag, found_with",
  [
    (GPU, "--model=x", "--suite=gpu"),
    (GPU, "--prompt_tokens=128", "--suite=gpu"),  # its default too
    (GPU, "--new_tokens=4", "--suite=gpu"),
    (GPU, "--repeats=3", "--suite=gpu"),
    (f"{GPU} --parts=plain", "--nodes=4", "--parts=plain, expected verify"),
    (f"{GPU} --parts=plain", "--contexts=4096", "--parts=plain, expected long or chunk"),
    (f"{GPU} --parts=engine", "--weights=bf16,int4", "found ['int4']"),
    (f"{GPU} --parts=engine", "--compile_only", "which compile as they run"),
    ("bench_decode", "--parts=plain", "--suite=plain"),
    ("bench_decode --suite=lowbit", "--weights=int4", "--suite=lowbit"),
    ("bench_decode", "--compilers=4", "--suite=plain"),
    ("bench_decode", "--nodes=4", "--suite=plain"),
    ("bench_decode", "--contexts=9", "--suite=plain"),
    ("bench_decode", "--compile_only", "--suite=plain"),
    ("bench_decode --suite=speculative", "--shape=nano", "--suite=speculative"),
    ("bench_decode --suite=speculative", "--prompt_tokens=9", "--suite=speculative"),
    ("bench_decode --shape=nano", "--model=x", "found both"),
    ("bench_train", "--parts=FP8", "--suite=peer"),
    ("bench_train --suite=qat", "--budget=5", "--suite=qat"),
    ("bench_train --suite=compile", "--repeats=3", "--suite=compile"),
    ("bench_train --suite=mfu", "--seq_len=64", "--suite=mfu"),
    ("bench_train --suite=mfu", "--batch_size=4", "--suite=mfu"),
    ("bench_train --suite=scaling", "--batch_size=12", "expected a multiple of 8"),
    ("bench_train", "--sizes=", "found []"),
    ("bench_train", "--threads=4096", "found 4096"),
    ("generate --model=x", "--spec_tree_size=8", "no draft"),
    ("generate --model=x --draft_kind=ngram", "--spec_num_iter=3", "ngram drafts"),
    ("generate --model=x --draft_kind=mtp", "--spec_window_size=0", "mtp drafts"),
    ("generate --model=x --draft_kind=chain", "--spec_topk_per_iter=3", "chain drafts"),
    ("generate --model=x", "--bita_width=4", "no draft"),
    ("generate --model=x", "--hier_min_length=4", "no draft"),
    ("generate --model=x", "--frspec_vocab_size=9", "no --frspec_path"),
    ("generate --model=x", "--fast_forward", "no --json_schema or --grammar_file"),
    ("generate --model=x", "--max_batch=2", "expected 1"),
    ("serve --model=x", "--spec_tree_size=8", "no draft"),
    ("serve --model=x", "--frspec_vocab_size=9", "no --frspec_path"),
    ("serve --model=x --nowarmup", "--warmup_tokens=9", "--nowarmup"),
    ("serve --model=x --nowarmup", "--warmup_constrained", "--nowarmup"),
  ],
)
def test_commands_refuse_it(command, flag, found_with, capsys):
  name, *argv = command.split()
  module = {m.__name__.split(".")[1]: m for m in (bench_decode, bench_train, generate, serve)}[name]
  assert module.main([name, *argv, flag]) == 1
  error = capsys.readouterr().err
  assert len(error.splitlines()) == 1 and error.startswith(f"{name}: ")
  assert flag.partition("=")[0] in error and found_with in error


def test_the_suites_read_all_other_flags():
  """A suite's own flags are not refused, and every name is a flag."""
  for suite in (*_bench_decode.SUITES, _bench_decode.GPU):
    assert set(_bench_decode.unread(suite)) < set(bench_decode.VALUES)
    assert not {"suite", "output"} & set(_bench_decode.unread(suite))
  assert "shape" not in _bench_decode.unread("plain") + _bench_decode.unread("gpu")
  for suite in ("peer", "compile", "memory", "scaling", "mfu", "qat"):
    assert set(_bench_mfu.unread(suite)) < set(bench_train.VALUES)
  assert {"parts", "budget"}.isdisjoint(_bench_mfu.unread("mfu"))
  assert "seq_len" not in _bench_mfu.unread("qat")  # the CPU's own suite


def test_sparse_flags_of_a_dense_model():
  model = transformer.Transformer(zoo.nano())
  for field, value in (("sparse_topk_k", 16), ("sparse_switch", 4), ("use_compress_lse", False)):
    with pytest.raises(ValueError, match=f"--{field}: found {value} with dense attention"):
      _infer._as_asked(config.InferConfig(**{field: value}), model, {})
  assert _infer._as_asked(config.InferConfig(), model, {})[0].cfg == model.cfg


def test_sides_of_random_weights_say_that_there_is_no_file():
  names, missing = _bench_decode.available(_bench_decode.SUITES["plain"], is_random=True)
  assert "llama.cpp, 4 bits" not in names and "no file" in missing["llama.cpp, 4 bits"]
  one = _bench_decode.Settings(num_new=5)
  assert _bench_decode.on_texts("plain", one) == [one]
  both = _bench_decode.on_texts("speculative", one)
  assert [(s.text, s.num_prompt, s.num_new) for s in both] == [
    ("table", None, 5),
    ("free", None, 5),
  ]


def test_flags_of_drafts_that_no_draft_reads(tmp_path):
  model, params = common.build(common.config(num_layers=1))
  cfg = draft_lib.for_target(model.cfg, "minicpm")
  draft = draft_lib.Draft(cfg, draft_lib.init_params(cfg, jax.random.key(0)))
  ckpt.save_draft(tmp_path / "d", draft, model.cfg)
  ids, sizes = np.arange(8), {"num_levels": 2, "top_k": 2, "num_nodes": 4}

  def check(*argv, fr_ids=None):
    values = _command.parse(bench_drafts.VALUES, ["x", *argv], None)
    made = _bench_drafts.drafters(model, params, values.draft, fr_ids, sizes)
    _bench_drafts.check_read(values, model, fr_ids, made)

  eagle = f"--draft=a:{tmp_path / 'd'}"
  for argv, found_with in (
    (["--top_k=3"], "no draft that grows a tree"),
    (["--draft_logit_scale=1"], "no EAGLE draft"),
    ([f"{eagle}:2/2/4", "--nodes=6"], "trees of their own"),
  ):
    with pytest.raises(ValueError, match=f"{argv[-1].split('=')[0]}: found with .*{found_with}"):
      check(*argv)
  with pytest.raises(ValueError, match="--fr: found with no draft that scores"):
    check("--fr=x", fr_ids=ids)
  check(eagle, "--top_k=3", "--draft_logit_scale=1", "--fr=x", fr_ids=ids)
  check(f"{eagle}:2/2/4", "--levels=3")  # n-grams have levels too


@pytest.mark.parametrize("command", [bench_drafts, tune_tree], ids=["drafts", "tree"])
def test_a_share_is_of_a_shard_folder(command, tmp_path):
  np.save(tmp_path / "fr.npy", np.arange(6, dtype=np.int32))
  share = "--fr_share=0.5"

  def parse(*argv):
    return _command.parse(command.VALUES, ["x", *argv], None)

  with pytest.raises(ValueError, match="--fr_share: found with no --fr, which"):
    _bench_drafts.fr_index(parse(share), 8, ())
  stored = f"--fr={tmp_path / 'fr.npy'}"
  with pytest.raises(ValueError, match="--fr_share: found with the stored index"):
    _bench_drafts.fr_index(parse(share, stored), 8, ())
  assert _bench_drafts.fr_index(parse(stored), 8, ()).tolist() == [0, 1, 2, 3, 4, 5]
  assert _bench_drafts.fr_index(parse(), 8, ()) is None
  docs = documents.from_texts(["1 2 3 3"])
  shards.prepare(docs, tmp_path / "t", name="t", tokenizer=_regenerate.Ids(8), add_eos=False)
  found = _bench_drafts.fr_index(parse(share, f"--fr={tmp_path / 't'}"), 8, ())
  assert len(found) == 4 and {1, 2, 3} < set(found.tolist())
