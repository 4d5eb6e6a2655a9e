"""Unions of neighbouring lists are counted as sets count them; the command refuses bad input."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import _block_overlap as overlap
from experiments import _quantize, block_overlap
from experiments import _selection_probe as selection
from minicpm_jax import ckpt, config
from minicpm_jax.nn import sparse_attention
from minicpm_jax.text import tokenizer
from pallas_kernels.sparse_topk import rule as rules
from tests.models import common


def by_sets(ids_KTW, sizes, block, num_local):
  """The counts of `overlap` by its docstring, query by query; one initial block."""
  T = ids_KTW.shape[1]
  lists = [
    [{b for b in row if 1 <= b <= t // block - num_local} for t, row in enumerate(head)]
    for head in ids_KTW.tolist()
  ]
  one = np.mean([len(free) for head in lists for free in head[T // 2 :]])
  tiles = [[set().union(*h[t : t + n]) for h in lists for t in range(T // 2, T, n)] for n in sizes]
  return one, [np.mean([len(tile) for tile in row]) for row in tiles]


@pytest.mark.parametrize("choice, num_local", [("joint", 3), ("split", 2)])
def test_counts_are_those_of_sets(choice, num_local):
  rng = np.random.default_rng(0)
  rule = rules.Rule(block_size=8, local_blocks=2, topk=4, selection=choice)
  ids = rng.permuted(np.tile(np.arange(16), (2, 128, 1)), axis=-1)[..., :6]
  ids[np.arange(6) > rng.integers(0, 6, (2, 128, 1))] = -1  # lists of unequal length
  found = overlap.overlap(ids, rule, (1, 2, 4, 8))
  wanted = by_sets(ids, (1, 2, 4, 8), 8, num_local)
  np.testing.assert_allclose(found[0], wanted[0])
  np.testing.assert_allclose(found[1], wanted[1])
  assert found[0] == found[1][0] < found[1][1] < found[1][3]
  with pytest.raises(ValueError, match=r"length: found 128, expected halves that \[3\] queries"):
    overlap.overlap(ids, rule, (2, 3))
  with pytest.raises(ValueError, match="length: found 32 tokens and no free block"):
    overlap.overlap(ids[:, :32] % 4, dataclasses.replace(rule, local_blocks=4))


def test_the_command_counts_on_a_folder(tmp_path, capsys):
  pytest.importorskip("tokenizers")
  text = tmp_path / "text.txt"
  text.write_text("".join(f"{n} squared is {n * n}, and its cube {n**3}. " for n in range(200)))
  tok = tokenizer.train_bpe([text.read_text()], 270)
  shape = common.config("minicpm4_0p5b", num_layers=2, vocab_size=270, max_position=512)
  ckpt.save_hf(tmp_path / "hf", *common.build(shape), tok)
  args = ["block_overlap", f"--model={tmp_path / 'hf'}", f"--text={text}", f"--output={tmp_path}"]
  args += ["--topk=4", "--window_size=64", "--case=", "--sequences=2"]
  assert block_overlap.main([*args, "--length=512"]) == 0
  result = json.loads((tmp_path / "block_overlap.json").read_text())
  (found,) = result["text_lists"]
  assert (found["length"], found["blocks"], found["sequences"]) == (512, 8, 2)

  model, params, tok = ckpt.load_hf(tmp_path / "hf", scan_layers=False)
  rows = _quantize.token_stream([text], tok)[: 2 * 512].reshape(2, 512)
  layers = jax.jit(lambda p, t: selection.queries_and_keys(model.cfg, p, t)[0])(params, rows)
  sparse = config.SparseAttentionConfig(topk=4, window_size=64, lse="coarse")
  select = jax.jit(
    lambda q, k: sparse_attention.select_blocks(q, k, sparse, implementation="ref")[0]
  )
  times, ones = [], []
  for q, k in layers:
    counts = [by_sets(row, (2, 4, 8), 64, 2) for row in np.asarray(select(q, k))]
    times.append(np.mean([np.divide(unions, one) for one, unions in counts], axis=0))
    ones.append(np.mean([one for one, _ in counts]))
  np.testing.assert_allclose(found["by_layer"], times, atol=6e-4)
  np.testing.assert_allclose(found["times_one_list"], np.mean(times, axis=0), atol=6e-4)
  np.testing.assert_allclose(found["free_blocks_of_a_list"], np.mean(ones), atol=6e-4)

  for bad, message in (
    ("--length=1024", "--length: found [1024], expected 2 to 512"),
    ("--sequences=0", "--sequences: found 0"),
    ("--case=8b", "--case: found '8b', expected one of minicpm4_0p5b_8k"),
  ):
    more = [] if "length" in bad else ["--length=512"]
    assert block_overlap.main([*args, *more, bad]) == 1
    assert message in capsys.readouterr().err
