"""Names of floating-point types as configs spell them; `core.types.dtype_of` maps them to jax."""

from typing import Literal

DTypeName = Literal["f32", "bf16", "f16"]
