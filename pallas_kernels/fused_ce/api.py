"""Cross entropy of an unembedding in one call; see `fused_cross_entropy`."""

from typing import Literal

from pallas_kernels.fused_ce import ref, xla

Implementation = Literal["auto", "ref", "xla"]


def fused_cross_entropy(
  hidden_TD,
  weight_DV,
  targets_T,
  mask_T,
  *,
  divisor: float = 1.0,
  z_loss: float = 0.0,
  vocab_size: int | None = None,
  per_token: bool = False,
  implementation: Implementation = "auto",
  config: xla.XlaConfig | None = None,
):
  """(loss, z, correct), three float32 sums over tokens weighted by `mask_T`.

  logits = hidden @ weight / divisor over the first `vocab_size` columns (the rest is padding);
  loss = log Z - logit of the target + z_loss * (log Z)^2, so it already contains z, the last term
  on its own. `correct` counts targets whose logit is the largest. Gradients flow from `loss` to
  hidden and weight only; with `xla` they are formed in the forward pass, O(chunk * V) memory.
  `per_token` adds a fourth result, log Z - logit of the target for every token [T], unmasked.
  """
  arguments = dict(
    divisor=divisor,
    z_loss=z_loss,
    vocab_size=weight_DV.shape[1] if vocab_size is None else vocab_size,
  )
  if implementation == "ref":
    found = ref.fused_cross_entropy_ref(hidden_TD, weight_DV, targets_T, mask_T, **arguments)
  else:
    found = xla.fused_cross_entropy_xla(
      hidden_TD, weight_DV, targets_T, mask_T, **arguments, config=config
    )
  return found if per_token else found[:3]
