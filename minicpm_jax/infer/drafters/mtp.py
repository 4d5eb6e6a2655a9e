"""The multi-token-prediction module of pretraining as a drafter (MiniCPM4 §2.3.2, §4.1.1).

It is MiniCPM4's EAGLE layer under other names (`models.convert.mtp_to_eagle`); beyond the first
level the same module runs on its own output.
"""

from typing import Any

from minicpm_jax.infer.drafters import eagle
from minicpm_jax.models import convert, transformer
from minicpm_jax.models import draft as draft_lib


def make(
  model: transformer.Transformer, params: Any, *, fr_ids: Any = None, **sizes: int
) -> tuple[eagle.EagleDrafter, dict[str, Any]]:
  """(drafter, draft_params) from the target's own `params["mtp"]`; `sizes` as in `eagle.make`."""
  draft = draft_lib.Draft(*convert.mtp_to_eagle(model.cfg, params))
  return eagle.make(draft, model, params, fr_ids=fr_ids, **sizes)
