"""The k largest logits of rows behind one function; see `top_k`."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.common import spec
from pallas_kernels.vocab_topk import triton, xla

OP = "vocab_topk"


def top_k(
  x_NV: Float[Array, "N V"],
  k: int,
  *,
  implementation: spec.Implementation = "auto",
  config: triton.TritonConfig | None = None,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
  """`jax.lax.top_k` of a few long rows: (values, int32 indices), largest first, ties by the lower
  index (of rows with several NaN other ones may be named). No gradient.

  NotImplementedError: a named implementation that does not serve the call (triton: a CUDA device,
  up to 64 of at least 8 times as many logits as it looks at closely). Reads the logits once, and k
  chunks of about sqrt(V / k) again.
  """
  x_NV = jax.lax.stop_gradient(x_NV)
  tiles = spec.configs(OP, implementation, config, triton=triton.TritonConfig)
  return spec.dispatch(
    OP,
    implementation,
    {
      "triton": lambda: triton.top_k_triton(x_NV, k, tiles["triton"]),
      "xla": lambda: xla.top_k_xla(x_NV, k),
      "ref": lambda: tuple(jax.lax.top_k(x_NV, k)),
    },
  )
