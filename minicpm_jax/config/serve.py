"""Configuration of the HTTP server."""

import dataclasses

from minicpm_jax.config.infer import SamplingConfig
from minicpm_jax.config.validate import require, require_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
  """Limits and address; the decode settings are the engine's."""

  host: str = "127.0.0.1"
  port: int = 8000  # 0 = any free one
  max_queue: int = 64  # requests that wait for a row; beyond it 429
  max_body_bytes: int = 4 * 2**20  # beyond it 413
  max_tokens: int = 65536  # largest max_tokens of a request
  default_max_tokens: int = 1024
  sampling: SamplingConfig = SamplingConfig()  # where a request says nothing; not its length, seed
  shutdown_seconds: float = 30.0  # answers under way may end in this time

  def __post_init__(self):
    require_hints(self, "server.")
    require(0 <= self.port < 65536, "server.port", self.port, "0..65535")
    require(self.max_queue >= 1, "server.max_queue", self.max_queue, "requests >= 1")
    require(self.max_body_bytes >= 1024, "server.max_body_bytes", self.max_body_bytes, ">= 1024")
    require(self.max_tokens >= 1, "server.max_tokens", self.max_tokens, "tokens >= 1")
    default = self.default_max_tokens
    require(1 <= default <= self.max_tokens, "server.default_max_tokens", default, "1..max_tokens")
    seconds = self.shutdown_seconds
    require(seconds >= 0, "server.shutdown_seconds", seconds, "seconds >= 0")
