"""What bench_train measures with: our train step, the torch peer, timing, reports."""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.models import transformer, zoo
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "results"
_FAMILY = dict(
  head_dim=64, max_position=4096, scale_emb=12.0, scale_depth=1.4, dim_model_base=256, norm_eps=1e-5
)
# MiniCPM4's form (grouped queries, tied head, muP) at the sizes of the comparison.
SIZES = {
  "20m": config.ModelConfig(
    name="20m",
    vocab_size=4096,
    model_dim=512,
    mlp_dim=1280,
    num_layers=7,
    num_heads=8,
    num_kv_heads=2,
    **_FAMILY,
  ),
  "60m": config.ModelConfig(
    name="60m",
    vocab_size=8192,
    model_dim=768,
    mlp_dim=1920,
    num_layers=9,
    num_heads=12,
    num_kv_heads=4,
    **_FAMILY,
  ),
}


def num_params(cfg: config.ModelConfig) -> int:
  return zoo.param_counts(cfg).total


class Ours:
  """The train step of `train.loop`, compiled for one batch shape of random tokens."""

  def __init__(
    self,
    cfg: config.ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    mesh_cfg: config.MeshConfig = config.MeshConfig(),
    grad_accum: int = 1,
  ):
    self.tokens = batch_size * seq_len
    self.mesh = mesh_lib.make_mesh(mesh_cfg)
    optim = config.OptimConfig(schedule=config.ScheduleConfig(stable_steps=10**6))
    with jax.set_mesh(self.mesh):
      model = transformer.Transformer(cfg)
      optimizer = build.make_optimizer(optim, cfg, transformer.abstract_params(model)[0])
      self._optimizer, self._model = optimizer, model
      self._abstract = step_lib.abstract_state(model, optimizer, self.mesh)
      step = step_lib.make_train_step(
        step_lib.make_loss_fn(model),
        step_lib.make_totals_fn(model),
        optimizer,
        grad_accum=grad_accum,
      )
      self._schedule = schedules.schedule_arrays(optim.schedule, optim.peak_lr)
      self._batch = mesh_lib.shard_batch(self.mesh, random_batch(cfg, batch_size, seq_len))
      jitted = step_lib.jit_train_step(step, self._abstract, self.mesh)
      began = time.perf_counter()
      lowered = jitted.lower(self._abstract, self._batch, self._schedule)
      self.lower_seconds = time.perf_counter() - began
      began = time.perf_counter()
      self.compiled = lowered.compile()
      self.compile_seconds = time.perf_counter() - began
    self._state = None

  def step(self) -> float:
    """One update; waits for its loss."""
    with jax.set_mesh(self.mesh):
      if self._state is None:
        params = step_lib.init_params(self._model, self._abstract, 0)
        self._state = step_lib.fresh_state(self._optimizer, params, self._abstract)
      self._state, metrics, _ = self.compiled(self._state, self._batch, self._schedule)
      return float(metrics["loss"].sum) / float(metrics["loss"].weight)


def random_batch(cfg: config.ModelConfig, batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
  """One document a row, all targets trained."""
  shape = (batch_size, seq_len)
  tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch_size, seq_len + 1))
  tokens = tokens.astype(np.int32)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "loss_mask": np.ones(shape, np.float32),
    "segment_ids": np.ones(shape, np.int32),
    "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape).copy(),
    "source_ids": np.zeros(shape, np.int32),
  }


class Granite:
  """transformers' Granite (our arithmetic: muP multipliers, GQA, SwiGLU, tied head) on torch.

  SDPA attention, fused AdamW, clipping by the global norm: the fastest eager form.
  """

  def __init__(self, cfg: config.ModelConfig, *, batch_size: int, seq_len: int, threads: int):
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    granite = transformers.GraniteConfig(
      vocab_size=cfg.vocab_size,
      hidden_size=cfg.model_dim,
      intermediate_size=cfg.mlp_dim,
      num_hidden_layers=cfg.num_layers,
      num_attention_heads=cfg.num_heads,
      num_key_value_heads=cfg.num_kv_heads,
      max_position_embeddings=cfg.max_position,
      rms_norm_eps=cfg.norm_eps,
      tie_word_embeddings=cfg.tie_embeddings,
      embedding_multiplier=cfg.scale_emb,
      residual_multiplier=cfg.residual_scale,
      logits_scaling=cfg.logit_divisor,
      attention_multiplier=cfg.head_dim**-0.5,
      use_cache=False,
      attn_implementation="sdpa",
    )
    self._model = transformers.GraniteForCausalLM(granite).train()
    self.num_params = sum(p.numel() for p in self._model.parameters())
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    self._clip = torch.nn.utils.clip_grad_norm_
    self._tokens = torch.randint(0, cfg.vocab_size, (batch_size, seq_len))

  def step(self) -> float:
    loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
    loss.backward()
    self._clip(self._model.parameters(), 1.0)
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return loss.item()


@dataclasses.dataclass
class Times:
  """Wall and CPU seconds of the steps of one side."""

  wall: list[float] = dataclasses.field(default_factory=list)
  cpu: list[float] = dataclasses.field(default_factory=list)

  @property
  def median(self) -> float:
    return statistics.median(self.wall)


def interleave(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
  """Times `repeats` rounds of one step each, in turn; one more round before is thrown away."""
  times = {name: Times() for name in steps}
  for i in range(repeats + 1):
    for name, step in steps.items():
      wall, cpu = time.perf_counter(), time.process_time()
      step()
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      if i:
        times[name].wall.append(wall)
        times[name].cpu.append(cpu)
  return times


def environment() -> dict[str, Any]:
  """Device, versions and load, for every result file."""
  device = jax.devices()[0]
  cpu = platform.processor() or platform.machine()
  if pathlib.Path("/proc/cpuinfo").exists():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
  return {
    "device": f"{device.platform}: {device.device_kind}",
    "cpu": cpu,
    "num_cpus": os.cpu_count(),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "load_average": os.getloadavg(),
    "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
  }


def table(rows: list[dict[str, Any]]) -> str:
  """A markdown table; the columns are those of the first row."""
  names = list(rows[0])
  lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
  for row in rows:
    cells = (f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names)
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def write(suite: str, rows: list[dict[str, Any]], **more: Any) -> pathlib.Path:
  """benchmarks/results/bench_train_SUITE.json, and the table on the screen."""
  RESULTS.mkdir(parents=True, exist_ok=True)
  path = RESULTS / f"bench_train_{suite}.json"
  partial = path.with_suffix(".json.tmp")
  text = json.dumps({"environment": environment(), **more, "rows": rows}, indent=1)
  partial.write_text(text + "\n")
  os.replace(partial, path)
  print(table(rows), f"\n\n{path}", flush=True)
  return path
