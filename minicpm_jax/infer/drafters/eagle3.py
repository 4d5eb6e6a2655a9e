"""EAGLE-3: three features of the target, a head and a vocabulary of its own (inference.md 10).

The dataflow of a round is that of `eagle`; what differs is in the draft's config: `feature_layers`
are the layers whose input the engine hands over, and row i of the head is the full id `ids[i]`.
"""

from typing import Any

from minicpm_jax.infer.drafters import eagle
from minicpm_jax.models import draft as draft_lib
from minicpm_jax.models import transformer


def make(
  draft: draft_lib.Draft, model: transformer.Transformer, params: Any, **sizes: int
) -> tuple[eagle.EagleDrafter, dict[str, Any]]:
  """(drafter, draft_params) of an EAGLE-3 draft; `sizes` as in `eagle.make`."""
  if draft.cfg.kind != "eagle3":
    raise ValueError(f"draft.kind: found {draft.cfg.kind!r}, expected 'eagle3'")
  return eagle.make(draft, model, params, **sizes)
