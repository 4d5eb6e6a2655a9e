"""What bench_train measures with: our train step, the torch peer, timing."""

import dataclasses
import gc
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from minicpm_jax import config
from minicpm_jax.core import mesh as mesh_lib
from minicpm_jax.core import metrics
from minicpm_jax.models import transformer, zoo
from minicpm_jax.optim import build, schedules
from minicpm_jax.train import step as step_lib

_FAMILY = dict(
  head_dim=64, max_position=4096, scale_emb=12.0, scale_depth=1.4, dim_model_base=256, norm_eps=1e-5
)
# MiniCPM4's form (grouped queries, tied head, muP); tiny is for tests of this script.
SIZES = {
  "tiny": config.ModelConfig(
    name="tiny",
    vocab_size=256,
    model_dim=128,
    mlp_dim=256,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    **_FAMILY,
  ),
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
    mesh_cfg: config.MeshConfig | None = None,
    grad_accum: int = 1,
  ):
    self.tokens = batch_size * seq_len
    self.mesh = mesh_lib.make_mesh(mesh_cfg or config.MeshConfig())
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
        weights=step_lib.quantized_weights(cfg),
      )
      self._schedule = schedules.schedule_arrays(optim.schedule, optim.peak_lr)
      self.batch = mesh_lib.shard_batch(self.mesh, random_batch(cfg, batch_size, seq_len))
      jitted = step_lib.jit_train_step(step, self._abstract, self.mesh)
      began = time.perf_counter()
      lowered = jitted.lower(self._abstract, self.batch, self._schedule)
      self.lower_seconds = time.perf_counter() - began
      began = time.perf_counter()
      self.compiled = lowered.compile()
      self.compile_seconds = time.perf_counter() - began
    self._state = None

  def step(self) -> float:
    """One update; waits for its loss."""
    loss = self.dispatch(self.batch)
    return float(loss.sum) / float(loss.weight)

  def dispatch(self, batch: dict[str, jax.Array]) -> metrics.Metric:
    """One update; its loss, not waited for."""
    with jax.set_mesh(self.mesh):
      if self._state is None:
        params = step_lib.init_params(self._model, self._abstract, 0)
        self._state = step_lib.fresh_state(self._optimizer, params, self._abstract)
      self._state, values, _ = self.compiled(self._state, batch, self._schedule)
      return values["loss"]


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


# --- Suites: each returns the rows of its table -------------------------------------------------


def qat_rows(size: str, repeats: int, *, batch_size: int, seq_len: int) -> list[dict[str, Any]]:
  """The plain step and the quantised ones in turn; medians, and of the ratios in one round."""
  cfg, shape = SIZES[size], dict(batch_size=batch_size, seq_len=seq_len)
  quants = {
    "plain": None,
    "ternary, a scale a channel": config.QuantConfig(scheme="ternary"),
    "ternary, groups of 128": config.QuantConfig(scheme="ternary", group_size=128),
  }
  steps = {n: Ours(dataclasses.replace(cfg, quant=q), **shape).step for n, q in quants.items()}
  times = interleave(steps, repeats)
  plain = times["plain"]
  return [
    {
      "size": f"{size} ({num_params(cfg) / 1e6:.1f} M)",
      "side": name,
      "tok/s": batch_size * seq_len / t.median,
      "time to plain": statistics.median(a / b for a, b in zip(t.wall, plain.wall, strict=True)),
      "CPU to plain": statistics.median(a / b for a, b in zip(t.cpu, plain.cpu, strict=True)),
    }
    for name, t in times.items()
  ]


def peer_rows(size: str, repeats: int, *, batch_size: int, seq_len: int) -> list[dict[str, Any]]:
  """Ours with scanned layers, the scan unrolled, a list of layers, and torch, interleaved."""
  cfg, shape = SIZES[size], dict(batch_size=batch_size, seq_len=seq_len)
  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  peer = Granite(cfg, threads=threads, **shape)
  count = num_params(cfg)
  if peer.num_params != count:
    raise ValueError(f"peer {size}: found {peer.num_params} parameters, expected our {count}")
  steps = {
    "ours, scan": Ours(with_layers(cfg, 1), **shape).step,
    "ours, scan unrolled": Ours(with_layers(cfg, cfg.num_layers), **shape).step,
    "ours, layer list": Ours(with_layers(cfg, 0), **shape).step,
    "torch": peer.step,
  }
  times = interleave(steps, repeats)
  tokens = batch_size * seq_len
  return [
    {
      "size": f"{size} ({count / 1e6:.1f} M)",
      "side": name,
      "threads": threads,
      "tok/s": tokens / t.median,
      "best tok/s": tokens / min(t.wall),
      "ratio": times["torch"].median / t.median,
      "ratio of bests": min(times["torch"].wall) / min(t.wall),
      "CPU s a step": min(t.cpu),
      "load": os.getloadavg()[0],
    }
    for name, t in times.items()
  ]


def specs(suite: str, size: str) -> list[dict[str, Any]]:
  """What `row` measures for the rows of a suite, each in a process of its own."""
  forms = [("scan", 1), ("scan, unrolled", SIZES[size].num_layers), ("layer list", 0)]
  if suite == "compile":
    return [
      dict(suite=suite, size=size, layers=name, unroll=unroll, cache=cache)
      for name, unroll in forms
      for cache in ("empty", "filled")
    ]
  if suite == "memory":
    return [
      dict(suite=suite, size=size, layers=name, unroll=unroll, remat=policy)
      for name, unroll in (forms[0], forms[2])
      for policy in ("none", "dots", "full")
    ]
  return [dict(suite=suite, size=size, devices=count) for count in (1, 2, 4, 8)]


def row(spec: dict[str, Any], repeats: int, *, batch_size: int, seq_len: int) -> dict[str, Any]:
  """One row of the suites compile, memory and scaling; call it once in a fresh process."""
  cfg, shape = SIZES[spec["size"]], dict(batch_size=batch_size, seq_len=seq_len)
  shown = {key: spec[key] for key in ("size", "layers", "remat", "devices", "cache") if key in spec}
  if spec["suite"] == "scaling":
    mesh_cfg = config.MeshConfig(dp=spec["devices"], fsdp=1)
    run = Ours(cfg, mesh_cfg=mesh_cfg, **shape)
    times = interleave({"ours": run.step}, repeats)["ours"]
    return shown | {"tok/s": run.tokens / times.median, "CPU s a step": min(times.cpu)}
  cfg = with_layers(cfg, spec["unroll"])
  run = Ours(dataclasses.replace(cfg, remat=spec.get("remat", "none")), **shape)
  if spec["suite"] == "compile":
    return shown | {"trace s": run.lower_seconds, "compile s": run.compile_seconds}
  before = reset_peak()
  times = interleave({"ours": run.step}, repeats)["ours"]
  memory = run.compiled.memory_analysis()
  return shown | {
    "temporary MB": memory.temp_size_in_bytes / 2**20,
    "state MB": memory.argument_size_in_bytes / 2**20,
    "peak of the process MB": peak_mb(),
    "of which before the first step MB": before,
    "tok/s": run.tokens / times.median,
  }


def with_layers(cfg: config.ModelConfig, unroll: int) -> config.ModelConfig:
  """Layers as a list (0), or scanned with so many in one turn."""
  return dataclasses.replace(cfg, scan_layers=unroll > 0, scan_unroll=max(unroll, 1))


def peak_mb(field: str = "VmHWM") -> float:
  """Largest resident size of this process since `reset_peak` (Linux)."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return int(next(x for x in lines if x.startswith(field)).split()[1]) / 2**10


def reset_peak() -> float:
  """Forgets the peak so far (the compiler's), returns the present size in MB (proc(5))."""
  gc.collect()
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return peak_mb("VmRSS")
