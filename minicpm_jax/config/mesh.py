"""Device mesh configuration: all six axes always exist, size 1 when unused (style.md 2.3)."""

import dataclasses

from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 on at most one axis means "all remaining devices"."""

  dp: int = -1  # data parallel, parameters replicated
  fsdp: int = 1  # data parallel, parameters sharded
  ep: int = 1  # experts (and batch outside MoE)
  tp: int = 1  # heads, mlp, vocab
  cp: int = 1  # sequence / context
  pp: int = 1  # pipeline: not built, must be 1

  def __post_init__(self):
    require_hints(self, "mesh.")
    sizes = dataclasses.asdict(self)
    for name, size in sizes.items():
      require(size == -1 or size >= 1, f"mesh.{name}", size, "-1 or an integer >= 1")
    require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "at most one axis of size -1")
    require(self.pp == 1, "mesh.pp", self.pp, "1 (pipeline parallelism is not built)")
