"""The k largest of a draft level's logits: `python -m pallas_kernels.vocab_topk.bench`.

FLOPs are one comparison a logit, bytes one reading of them; `x dense` is against XLA's own
`jax.lax.top_k`. A row ends with whether its indices are those of `ref`. No tiles to --tune.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.common import bench
from pallas_kernels.vocab_topk import api, cases


def main(
  argv: Sequence[str] | None = None, shapes: dict[str, cases.Case] = cases.REAL
) -> list[bench.Row]:
  args = bench.arguments(api.OP, shapes, argv)
  if args.tune:
    print(f"{api.OP}: no tiles to search")
  rows = []
  for name in args.cases:
    case = shapes[name]
    x_NV = jax.random.normal(jax.random.key(0), (case.rows, case.vocab_size), jnp.float32)
    run = functools.partial(api.top_k, k=case.k, implementation=args.implementation)
    ref = functools.partial(api.top_k, k=case.k, implementation="ref")
    same = bool(jnp.all(jax.jit(run)(x_NV)[1] == jax.jit(ref)(x_NV)[1]))
    rows.append(
      bench.Row(
        op=api.OP,
        case=name,
        implementation=args.implementation,
        seconds=bench.seconds(run, x_NV, repeats=args.repeats),
        flops=x_NV.size,
        bytes=x_NV.nbytes,
        dense_seconds=bench.seconds(ref, x_NV, repeats=args.repeats),
      )
    )
    print(f"{rows[-1].printed()}  indices {'equal' if same else 'DIFFER'}", flush=True)
  bench.report(rows, args.json)
  return rows


if __name__ == "__main__":
  main()
