"""The parts of `bench_decode --suite=gpu`: which programs, which rows, what happens on errors."""

import concurrent.futures
import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import _bench_gpu as bench
from experiments import _forced, _results
from minicpm_jax import config
from minicpm_jax.core import trees
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer.drafters import base, eagle
from minicpm_jax.models import transformer
from pallas_kernels.common import bench as kernels

PATTERNS = {"1": (1, 1), "2": (2, 2), "2.5": (2, 3), "3": (3, 3)}  # tokens of rounds, in turn
PARTS = ("plain", "verify", "spec", "draft", "engine", "long", "chunk", "prefill")
LEVELS = (2, 4)  # of drafts whose difference gives the time of a level
KINDS_OF = {"engine": ("bf16",), "prefill": ("bf16",)}  # others: every kind
LONG = ("long", "chunk")  # bf16 alone unless kinds are asked for
COMPILED_AS_THEY_RUN = ("engine", "prefill")


def run(
  shape: str,
  output: str | None,
  *,
  asked: Sequence[str] | None,
  parts: Sequence[str] | None,
  num_threads: int,
  nodes: Sequence[int] | None = None,
  contexts: Sequence[int] | None = None,
  is_only_compiled: bool = False,
) -> int:
  """Writes OUTPUT/bench_decode_gpu_SHAPE.json after every row; 1 where a part failed.

  ValueError for unknown names. `asked`: kinds of weights, None: bf16 and int4 where a part reads
  them. `parts` None: all but prefill. `nodes`: of the part verify. `contexts`: of long and chunk.
  `is_only_compiled`: programs go into the compilation cache, nothing is timed.
  """
  parts = [p for p in PARTS if p != "prefill"] if parts is None else parts
  kinds = ("bf16", "int4") if asked is None else asked
  for flag, found, expected in (("parts", parts, PARTS), ("weights", kinds, tuple(bench.QUANT))):
    if unknown := sorted(set(found) - set(expected)):
      raise ValueError(f"--{flag}: found {unknown}, expected some of {list(expected)}")
  size = bench.sizes(shape)
  if nodes and "verify" not in parts:
    raise ValueError(f"--nodes: found with --parts={','.join(parts)}, expected verify among them")
  if contexts and not set(parts) & set(LONG):
    expected = " or ".join(LONG)
    raise ValueError(f"--contexts: found with --parts={','.join(parts)}, expected {expected}")
  if short := [n for n in contexts or () if n <= size.chunk]:
    raise ValueError(f"--contexts: found {short}, expected more than a chunk of {size.chunk}")
  kinds_of = KINDS_OF | (dict.fromkeys(LONG, ("bf16",)) if asked is None else {})
  read = [k for k in kinds if any(k in kinds_of.get(part, (k,)) for part in parts)]
  if unread := sorted(set(asked or ()) - set(read)):
    raise ValueError(f"--weights: found {unread}, but {list(parts)} measure bf16 weights only")
  if is_only_compiled and not set(parts) - set(COMPILED_AS_THEY_RUN):
    raise ValueError(f"--compile_only: found with {list(parts)}, which compile as they run")
  if nodes:
    size = dataclasses.replace(size, nodes={kind: tuple(nodes) for kind in bench.QUANT})
  if contexts:
    size = dataclasses.replace(size, long=tuple(contexts))
  suite = Suite(size, parts, num_threads, kinds_of=kinds_of, is_only_compiled=is_only_compiled)
  folder = _results.folder(output)
  path = folder / f"bench_decode_gpu_{shape}.json"
  status = suite.run(read, lambda: _results.save(path, suite.rows, errors=suite.errors))
  print(path, flush=True)
  return status


class Suite:
  """Rows as they come; a part that fails leaves its error and the others go on."""

  def __init__(
    self,
    size: bench.Sizes,
    parts: Sequence[str],
    num_threads: int = 4,
    *,
    kinds_of: dict[str, tuple[str, ...]] = KINDS_OF,
    is_only_compiled: bool = False,
  ):
    self.size, self.parts, self.rows, self.errors = size, parts, [], []
    self._num_threads, self._is_only_compiled = num_threads, is_only_compiled
    self._kinds_of = kinds_of
    self._step_s: dict[str, float] = {}

  def run(self, kinds: Sequence[str], save: Callable[[], None]) -> int:
    """0, or 1 where something failed; saves after every row."""
    self._save = save
    for kind in kinds:
      made = self._guarded(f"{kind} weights", functools.partial(self._weights, kind))
      if made is not None:
        self._measure(kind, *made)
      del made
    return int(bool(self.errors))

  def _row(self, **values: Any) -> None:
    self.rows.append(values)
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print("  ".join(shown), flush=True)
    self._save()

  def _guarded(self, name: str, work: Callable[[], Any]) -> Any:
    try:
      return work()
    except Exception as error:  # a bench on a device that is lent for minutes goes on
      print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
      text = str(error).strip().splitlines() or [""]
      self.errors.append({"part": name, "error": f"{type(error).__name__}: {text[0][:500]}"})
      self._save()
      return None

  def _weights(self, kind: str) -> tuple[Any, ...]:
    began = time.perf_counter()
    cfg, params, draft_cfg, draft = bench.weights(self.size, kind)
    jax.block_until_ready((params, draft))
    seconds = time.perf_counter() - began
    self._row(part="weights", weights=kind, seconds=seconds, GB=trees.nbytes(params) / 1e9)
    return cfg, base.Params(params, draft), draft_cfg

  # --- One kind of weights ------------------------------------------------------------------------

  def _measure(self, kind: str, cfg: Any, params: base.Params, draft_cfg: Any) -> None:
    wanted = [p for p in self.parts if kind in self._kinds_of.get(p, (kind,))]
    programs = self._compiled(self._makers(kind, wanted, cfg, params, draft_cfg))
    if self._is_only_compiled:
      return
    for name, program in programs.items():
      part = name.split()[1]
      measures = {"draft": self._draft, "draft-fr": self._draft, "spec": self._spec}
      measure = (measures | {"chunk": self._chunk}).get(part, self._step)
      self._guarded(name, functools.partial(measure, kind, name, program))
    if "draft" in wanted:
      self._guarded(f"{kind} draft level", functools.partial(self._level, kind, "draft"))
      self._guarded(f"{kind} draft-fr level", functools.partial(self._level, kind, "draft-fr"))
    for part in ("engine", "prefill"):
      if part in wanted:
        for is_sparse in (True, False) if part == "prefill" else (False,):
          work = functools.partial(self._through_engine, kind, part, cfg, params, is_sparse)
          self._guarded(f"{kind} {part} {'sparse' if is_sparse else 'dense'}", work)

  def _makers(self, kind, wanted, cfg, params, draft_cfg) -> dict[str, Callable[[], Any]]:
    """{name: what traces it}; the first word of a name is the kind, the second the part."""
    size, plain = self.size, base.NoDrafter()
    dense = bench.dense(cfg)
    forced = _forced.Forced(eagle.EagleDrafter(draft_cfg, num_levels=2, top_k=10, num_nodes=12))
    makers: dict[str, Callable[[], Any]] = {}
    one = functools.partial(bench.Program, size)
    if "plain" in wanted:
      makers[f"{kind} plain"] = lambda: one(dense, params, plain, size.short)
      if kind == "bf16":
        makers[f"{kind} plain, 16 a dispatch"] = lambda: one(dense, params, plain, size.short, 16)
    for n in size.nodes[kind] if "verify" in wanted else ():
      makers[f"{kind} verify {n}"] = functools.partial(
        one, dense, params, _forced.Forced(None, n), size.short
      )
    if "spec" in wanted:
      makers[f"{kind} spec 2/10/12"] = lambda: one(dense, params, forced, size.short)
    for levels in LEVELS if "draft" in wanted else ():
      makers[f"{kind} draft {levels}"] = functools.partial(
        bench.DraftStep, size, dense, params, draft_cfg, levels
      )
    with_fr = functools.cache(lambda: bench.with_fr(params, cfg.vocab_size))
    for levels in LEVELS if "draft" in wanted else ():
      makers[f"{kind} draft-fr {levels}"] = lambda levels=levels: bench.DraftStep(
        size, dense, with_fr(), draft_cfg, levels
      )
    for length in size.long if "long" in wanted else ():
      for name, c in (("sparse", cfg), ("dense", dense)):
        makers[f"{kind} long {name} {length}"] = functools.partial(one, c, params, plain, length)
    for length in size.long if "chunk" in wanted else ():
      for name, c in (("sparse", cfg), ("dense", dense)):
        make = functools.partial(bench.Chunk, size, c, params, length)
        makers[f"{kind} chunk {name} {length}"] = make
    return makers

  def _compiled(self, makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """{name: program}: all at once, before anything is timed; without those that fail."""
    began, programs, futures = time.perf_counter(), {}, {}
    with concurrent.futures.ThreadPoolExecutor(self._num_threads) as pool:
      for name, make in makers.items():  # tracing one while others compile
        program = self._guarded(f"{name} (trace)", make)
        if program is not None:
          programs[name], futures[name] = program, pool.submit(program.compile)
      print(f"traced {len(programs)}: {time.perf_counter() - began:.1f} s", flush=True)
      for name, future in futures.items():
        seconds = self._guarded(f"{name} (compile)", future.result)
        if seconds is None:
          del programs[name]
        else:
          print(f"compiled {name}: {seconds:.1f} s", flush=True)
    if programs:
      seconds = time.perf_counter() - began
      self._row(part="compile", programs=len(programs), threads=self._num_threads, seconds=seconds)
    return programs

  # --- Parts --------------------------------------------------------------------------------------

  def _step(self, kind: str, name: str, program: bench.Program) -> None:
    """Rounds that emit one token: plain ones, trees that are not accepted, long contexts."""
    seconds, tokens = program.time()
    row = dict(part=name, context=program.length, ms=1e3 * seconds)
    if name == f"{kind} plain":
      self._step_s[kind] = seconds
    if name.split()[1] == "verify":
      self._row(**row, **self._against_plain(kind, seconds))
      return
    row |= {"tokens/s": tokens / seconds}
    bandwidth = kernels.peaks()[1]
    is_dense = program.model.cfg.sparse is None
    num_bytes = bench.bytes_a_step(program)
    row |= {"GB a step": num_bytes / 1e9} if is_dense else {}
    if bandwidth and is_dense:
      row |= {"% of bandwidth": 100 * num_bytes / seconds / bandwidth}
    self._row(**row)

  def _against_plain(self, kind: str, seconds: float) -> dict[str, float]:
    plain = self._step_s.get(kind)
    return {} if plain is None else {"/ plain step": seconds / plain}

  def _spec(self, kind: str, name: str, program: bench.Program) -> None:
    for wanted, pattern in PATTERNS.items():
      seconds, tokens = program.time(pattern)
      row = {"part": name, "context": program.length, "accept": wanted, "tokens a round": tokens}
      row |= {"ms": 1e3 * seconds, "tokens/s": tokens / seconds}
      if kind in self._step_s:
        row |= {"x plain": tokens / seconds * self._step_s[kind]}
      self._row(**row)

  def _chunk(self, kind: str, name: str, program: bench.Chunk) -> None:
    seconds = program.time()
    row = dict(part=name, context=program.length, ms=1e3 * seconds)
    self._row(**row, **{"prefill tokens/s": program.num / seconds})

  def _draft(self, kind: str, name: str, program: bench.DraftStep) -> None:
    seconds = program.time()
    self._step_s[name] = seconds
    self._row(part=name, ms=1e3 * seconds, **self._against_plain(kind, seconds))

  def _level(self, kind: str, part: str) -> None:
    """What a level adds."""
    few, many = (self._step_s.get(f"{kind} {part} {n}") for n in LEVELS)
    if few is not None and many is not None:
      level = (many - few) / (LEVELS[1] - LEVELS[0])
      self._row(part=f"{kind} {part} level", ms=1e3 * level, **self._against_plain(kind, level))

  def _through_engine(self, kind: str, part: str, cfg, params, is_sparse: bool) -> None:
    """`Engine.generate`: a short prompt and its answer, or a long prompt."""
    size = self.size
    is_long = part == "prefill"
    num_prompt, num_new = (size.prompt, 2) if is_long else (size.short // 2, 4 * size.calls)
    chunk = size.chunk if is_long else size.short // 2
    capacity = num_prompt + num_new + chunk
    limits = config.EngineConfig(
      capacity=capacity, chunk_size=chunk, min_span=2 * capacity, min_prefix=-1
    )
    model = transformer.Transformer(cfg if is_sparse else bench.dense(cfg))
    engine = engine_lib.Engine(model, params.target, limits)
    prompt = np.random.default_rng(0).integers(10, cfg.vocab_size, num_prompt).tolist()
    sampling = config.SamplingConfig(max_new_tokens=num_new)
    first = engine.generate([prompt], sampling)  # compiles; buffers
    out = engine.generate([prompt], sampling)
    stats = out.stats[0]
    row = {"part": f"{kind} {part}", "attention": "sparse" if is_sparse else "dense"}
    row |= {"prompt": num_prompt, "prefill s": stats.prefill_seconds}
    row |= {"prefill tokens/s": num_prompt / stats.prefill_seconds}
    if not is_long:
      row |= {"tokens/s": (stats.new_tokens - 1) / stats.decode_seconds}
      following = (prompt[-1] + 1 + np.arange(num_new)) % cfg.vocab_size
      row |= {"tokens as foreseen": bool((np.array(out.tokens[0]) == following).all())}
    self._row(**row, **{"compile s": first.stats[0].compile_seconds})
