"""StepLaw: learning rate and batch size by formula, for models without muP.

lr = 1.79 N^-0.713 D^0.307 and B = 0.58 D^0.571 tokens, N non-embedding parameters, D training
tokens (Li et al. 2025; MiniCPM4 table 3 compares with it and does not print it). Its fit covers
N from 60M to 1B and D from 2B to 100B; smaller runs are outside.
"""

import dataclasses
import math

Number = float | int

LR_COEFFICIENT, LR_N_EXPONENT, LR_D_EXPONENT = 1.79, -0.713, 0.307
BATCH_COEFFICIENT, BATCH_D_EXPONENT = 0.58, 0.571


def _check(**values: Number) -> None:
  for name, value in values.items():
    if not 0 < value < math.inf:
      raise ValueError(f"{name}: found {value}, expected a number > 0")


def learning_rate(n: Number, d: Number) -> float:
  """Peak learning rate of all parameters."""
  _check(n=n, d=d)
  return LR_COEFFICIENT * n**LR_N_EXPONENT * d**LR_D_EXPONENT


def batch_tokens(d: Number) -> float:
  """Tokens a step."""
  _check(d=d)
  return BATCH_COEFFICIENT * d**BATCH_D_EXPONENT


def round_sequences(sequences: Number, multiple: int = 16) -> int:
  """Nearest multiple (at least one), as MiniCPM4 rounds its vanilla runs."""
  _check(sequences=sequences, multiple=multiple)
  return max(1, int(sequences / multiple + 0.5)) * multiple


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What StepLaw says for one run."""

  learning_rate: float
  batch_tokens: float
  batch_sequences: int


def predict(n: Number, d: Number, *, seq_len: int, multiple: int = 16) -> Prediction:
  """The vanilla run of MiniCPM4 table 3: batch in sequences, rounded to a multiple of 16."""
  _check(seq_len=seq_len)
  tokens = batch_tokens(d)
  return Prediction(learning_rate(n, d), tokens, round_sequences(tokens / seq_len, multiple))
