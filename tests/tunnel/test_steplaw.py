"""StepLaw's values and ratios (training.md 10.2), from the formula."""

import pytest

from minicpm_jax.tunnel import steplaw

SEQ_LEN = 4096


@pytest.mark.parametrize(
  "n, d, lr, batch, sequences",
  [
    (150e6, 4e9, 2.35e-3, 176e3, 48),
    (150e6, 20e9, 3.85e-3, 442e3, None),
    (360e6, 40e9, 2.55e-3, 656e3, 160),
    (700e6, 100e9, 2.10e-3, 1.11e6, 272),
  ],
)
def test_values_of_the_table(n, d, lr, batch, sequences):
  found = steplaw.predict(n, d, seq_len=SEQ_LEN)
  assert found.learning_rate == pytest.approx(lr, rel=0.005)
  assert found.batch_tokens == pytest.approx(batch, rel=0.005)
  if sequences is not None:
    assert found.batch_sequences == sequences


def test_ratios():
  lr, batch = steplaw.learning_rate, steplaw.batch_tokens
  assert lr(1e9, 1e10) / lr(1e8, 1e10) == pytest.approx(0.194, abs=5e-4)
  assert lr(1e8, 1e11) / lr(1e8, 1e10) == pytest.approx(2.03, abs=5e-3)
  assert batch(1e11) / batch(1e10) == pytest.approx(3.72, abs=5e-3)


@pytest.mark.parametrize(
  "sequences, rounded", [(1, 16), (23.9, 16), (24, 32), (43, 48), (270, 272)]
)
def test_rounding(sequences, rounded):
  assert steplaw.round_sequences(sequences) == rounded


def test_bad_sizes_are_named():
  with pytest.raises(ValueError, match="n: found 0"):
    steplaw.learning_rate(0, 1e9)


def test_what_is_no_size_is_refused():
  with pytest.raises(ValueError, match="seq_len: found 0"):
    steplaw.predict(1e8, 1e9, seq_len=0)
  with pytest.raises(ValueError, match="d: found inf"):
    steplaw.learning_rate(1e8, float("inf"))
