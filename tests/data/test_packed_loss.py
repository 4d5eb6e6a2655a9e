"""Packed rows against the same documents one a row, through the real model (data.md 8, test 5)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpm_jax.data import packing
from minicpm_jax.models import transformer, zoo

SEQ_LEN, NUM_ROWS = 48, 14


class _Stream:
  name = "toy"

  def __init__(self, docs):
    self._docs = docs

  def read(self, start):
    return iter(self._docs[start:])

  def describe(self, document):
    return str(document)


@pytest.fixture(scope="module")
def nll():
  """(tokens, positions, segment_ids) -> -log p of each next token, [B, T-1]; and vocabulary."""
  cfg = dataclasses.replace(zoo.tiny(zoo.nano()), dtype="f32", mtp=None)
  model = transformer.Transformer(cfg)
  params = transformer.init_params(model, jax.random.key(0))

  @jax.jit
  def apply(tokens_BT, positions_BT, segment_ids_BT):
    out = model.apply({"params": params}, tokens_BT, positions_BT, segment_ids_BT)
    logp_BTV = jax.nn.log_softmax(out.logits[:, :-1] * 30)  # far from uniform at init
    return -jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]

  return apply, cfg.vocab_size


@pytest.mark.smoke
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_packed_loss_is_the_mean_over_the_separate_documents(nll, align, kind):
  apply, vocab_size = nll
  rng = np.random.default_rng(0)
  docs = [rng.integers(1, vocab_size, n).astype(np.int32) for n in (5, 17, 9, 30, 3, 12, 48, 20)]
  if kind == "concat":
    packer = packing.ConcatPacker(_Stream(docs), SEQ_LEN, align=align)
  else:
    packer = packing.BestFitPacker(_Stream(docs), SEQ_LEN, align=align, num_bins=3)
  rows = []
  while (row := packer.next_row()) is not None:
    rows.append(row)
  assert len(rows) < len(docs)
  rows += [packing.make_row([], SEQ_LEN)] * (NUM_ROWS - len(rows))  # one shape: one compilation
  batch = {key: np.stack([row[key] for row in rows]) for key in packing.KEYS}
  packed_BT = apply(batch["tokens"], batch["positions"], batch["segment_ids"])
  np.testing.assert_array_equal(
    np.where(batch["loss_mask"][:, :-1] > 0, batch["tokens"][:, 1:], 0), batch["targets"][:, :-1]
  )
  mask_BT = batch["loss_mask"][:, :-1]
  packed = float(np.sum(packed_BT * mask_BT) / mask_BT.sum())

  # Alone: every segment at the start of its own row; what follows cannot be seen (causal).
  pieces = [
    row["tokens"][row["segment_ids"] == i]
    for row in rows
    for i in range(1, row["segment_ids"].max() + 1)
  ]
  if kind == "best_fit":
    assert sorted(map(len, pieces)) == sorted(map(len, docs))
  alone = np.zeros((NUM_ROWS, SEQ_LEN), np.int32)
  for row, piece in zip(alone, pieces, strict=False):
    row[: len(piece)] = piece
  assert len(pieces) <= NUM_ROWS
  alone_BT = np.asarray(apply(alone, None, None), np.float64)
  values = np.concatenate([r[: len(p) - 1] for r, p in zip(alone_BT, pieces, strict=False)])
  assert packed == pytest.approx(values.mean(), rel=1e-5)
  assert values.std() > 0.1  # and it is not a constant that any mask would give

  # Control: as one segment a row, or with positions running on as well, the loss is another one.
  one_segment = np.minimum(batch["segment_ids"], 1)
  running = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (NUM_ROWS, 1))
  for positions in (batch["positions"], running):
    other_BT = apply(batch["tokens"], positions, one_segment)
    assert abs(float(np.sum(other_BT * mask_BT) / mask_BT.sum()) - packed) > 1e-4
