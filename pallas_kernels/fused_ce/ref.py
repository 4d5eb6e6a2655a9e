"""Cross entropy as the equation reads: all logits in memory, float32 (MiniCPM Table 7: divisor)."""

import jax
import jax.numpy as jnp


def fused_cross_entropy_ref(
  hidden_TD, weight_DV, targets_T, mask_T, *, divisor: float, z_loss: float, vocab_size: int
):
  """(loss sum, z sum, number correct) of log Z - logit of the target + z_loss * (log Z)^2, and
  log Z - logit of every token."""
  logits_TV = jnp.matmul(hidden_TD, weight_DV, preferred_element_type=jnp.float32)
  logits_TV = logits_TV[:, :vocab_size] / divisor
  log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
  picked_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
  z_T = z_loss * jnp.square(log_z_T)
  correct_T = picked_T >= jnp.max(logits_TV, axis=-1)
  mask_T = jax.lax.stop_gradient(mask_T.astype(jnp.float32))
  loss = jnp.sum(mask_T * (log_z_T - picked_T + z_T))
  z = jnp.sum(mask_T * z_T)
  return loss, *jax.lax.stop_gradient((z, jnp.sum(mask_T * correct_T), log_z_T - picked_T))
