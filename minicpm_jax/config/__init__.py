"""Frozen configuration dataclasses: data only, no jax."""

from minicpm_jax.config.cpmcu import InferConfig
from minicpm_jax.config.data import DataConfig, PhaseConfig, SourceConfig
from minicpm_jax.config.draft import BitaConfig, DistillConfig, DraftConfig
from minicpm_jax.config.dtypes import DTypeName
from minicpm_jax.config.infer import EngineConfig, SamplingConfig
from minicpm_jax.config.mesh import MeshConfig
from minicpm_jax.config.model import (
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
  RopeConfig,
  SparseAttentionConfig,
)
from minicpm_jax.config.optim import OptimConfig, ScheduleConfig
from minicpm_jax.config.override import as_python, override, overrides
from minicpm_jax.config.qat import QATConfig, int4_stages, qat_stages
from minicpm_jax.config.quant import FP8Config, QuantConfig
from minicpm_jax.config.serve import ServerConfig
from minicpm_jax.config.train import CheckpointConfig, TrainConfig

__all__ = [
  "BitaConfig",
  "CheckpointConfig",
  "DTypeName",
  "DataConfig",
  "DistillConfig",
  "DraftConfig",
  "EngineConfig",
  "FP8Config",
  "InferConfig",
  "MLAConfig",
  "MTPConfig",
  "MeshConfig",
  "MoEConfig",
  "ModelConfig",
  "OptimConfig",
  "PhaseConfig",
  "QATConfig",
  "QuantConfig",
  "RopeConfig",
  "SamplingConfig",
  "ScheduleConfig",
  "ServerConfig",
  "SourceConfig",
  "SparseAttentionConfig",
  "TrainConfig",
  "as_python",
  "override",
  "overrides",
  "int4_stages",
  "qat_stages",
]
