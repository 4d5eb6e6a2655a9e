"""Geometry and selection rule of InfLLM v2 (MiniCPM4 section 2.1; infllm_v2.md sections 2-7)."""

import dataclasses
import math
from typing import Literal

COARSE = 4  # one coarse window is this many times a fine one, in size and in stride
NOWHERE = 2**30  # start of a row that is padding: it sees nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """Sizes in tokens or blocks. `local_blocks` = window / block size, the current block included."""

  kernel_size: int = 32  # tokens averaged into one fine key
  kernel_stride: int = 16
  block_size: int = 64
  init_blocks: int = 1
  local_blocks: int = 32
  topk: int = 64
  selection: Literal["joint", "split"] = "joint"
  lse: Literal["exact", "coarse"] = "exact"

  @property
  def num_selected(self) -> int:
    """W: most blocks a query attends to; both rules have the same."""
    return self.topk + self.local_blocks

  @property
  def num_local(self) -> int:
    """Blocks at the end of the past, the current one included, that every query attends to."""
    return self.local_blocks + (self.selection == "joint")

  @property
  def alignment(self) -> int:
    """Documents start at multiples of this where all share one grid."""
    stride = self.kernel_stride * (COARSE if self.lse == "coarse" else 1)
    return math.lcm(stride, self.block_size)

  def num_windows(self, length: int, level: int = 1) -> int:
    """Complete windows among `length` tokens; level 1 = fine, COARSE = coarse."""
    return max(0, (length - level * self.kernel_size) // (level * self.kernel_stride) + 1)

  def num_blocks(self, length: int) -> int:
    return -(-length // self.block_size)
