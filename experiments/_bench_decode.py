"""What bench_decode measures with: our decoders and the peers, behind one small class each.

A side takes (weights, settings) once and then decodes greedily, without stop tokens, as often as
it is asked. To add one (a drafter), write a class with `run` and put it into SIDES.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from minicpm_jax import ckpt, config
from minicpm_jax.core import host_memory, trees
from minicpm_jax.infer import engine, generate
from minicpm_jax.infer.drafters import base, ngram
from minicpm_jax.models import joined, transformer, zoo
from minicpm_jax.quant import qtensor, tree

# Texts of our own. "prose" repeats itself, long enough for every prompt length; "free" does not;
# "table" is to be copied, which is what prompt lookup is for.
PROSE = (
  "The warm-up of a learning rate is short, the stable stage is long, and the decay comes at the "
  "end, when the loss falls faster than before. A run that has not decayed yet can go on for as "
  "long as there is data, and many short branches can be cut from one long trunk. "
) * 40
FREE = (
  "The history of the lighthouse on the northern cape begins with a storm in which three fishing "
  "boats were lost within sight of the village. In the spring after it, the council asked an "
  "engineer from the capital to"
)
_LINE = '{{"id": {0}, "name": "item{0}", "price": {1}, "in_stock": true}}\n'
_LINES = "".join(_LINE.format(i, 3 * i) for i in range(1, 13))
TABLE = f"Copy this table as JSON lines.\n{_LINES}Once more:\n{_LINE.format(1, 3)}"
TEXTS = {"prose": PROSE, "free": FREE, "table": TABLE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  num_prompt: int | None = 128  # tokens; None = the whole text
  num_new: int = 64  # tokens after the prompt
  threads: int = 2
  text: str = "prose"  # a name of TEXTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """The model of one GGUF file, or a random one, in the forms that the sides want."""

  path: pathlib.Path | None
  model: Any  # ours, in decoding form
  params: Any
  tok: Any  # None: random weights, prompts of random tokens

  @functools.cached_property
  def for_trees(self) -> tuple[Any, Any]:
    """(model, params) in the form that multiplies several rows fastest: nodes of a draft tree."""
    return generate.for_decoding(self.model, self.params, base.MAX_NODES)

  def prompt(self, num_tokens: int | None, text: str = "prose") -> list[int]:
    if text not in TEXTS:
      raise ValueError(f"--text: found {text!r}, expected one of {sorted(TEXTS)}")
    if self.tok is None:
      ids = np.random.default_rng(0).integers(10, self.model.cfg.vocab_size, num_tokens or 128)
      return ids.tolist()
    ids = self.tok.encode(TEXTS[text])[:num_tokens]
    if num_tokens is not None and len(ids) < num_tokens:
      raise ValueError(f"--prompt_tokens: found {num_tokens}, expected at most {len(ids)}")
    return ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """One run of one side; the first new token belongs to the prefill."""

  tokens: list[int]
  first_s: float
  rest_s: float
  compile_s: float = 0.0
  accept: float = 1.0  # tokens a round


class Side(Protocol):
  def run(self, prompt: Sequence[int], num_new: int) -> Timing: ...


def load(path: pathlib.Path) -> Weights:
  model, params, tok = ckpt.load_gguf(path, scan_layers=False)
  model, params = generate.for_decoding(model, params)
  return Weights(path=path, model=model, params=params, tok=tok)


def random(shape: str) -> Weights:
  """Random weights in the shape of a member, as a Llama with plain RoPE and a tied head."""
  cfg = zoo.ZOO[shape](dtype="f32", param_dtype="f32")
  plain = dict(scale_emb=1.0, scale_depth=None, dim_model_base=None, mup_denominator=None)
  cfg = dataclasses.replace(
    cfg, arch="llama", rope=config.RopeConfig(), tie_embeddings=True, **plain
  )
  model = transformer.Transformer(cfg)
  params = transformer.init_params(model, jax.random.key(0))
  model, params = generate.for_decoding(model, params)
  return Weights(path=None, model=model, params=params, tok=None)


def quantised(
  weights: Weights, scheme: str, group_size: int = -1, head: str | None = None
) -> Weights:
  """Projections rounded to nearest by the scheme's own rule; embedding and head stay float32, or
  are of the scheme `head` (its groups where that is the scheme)."""
  quant = config.QuantConfig(scheme=scheme, group_size=group_size, weights="packed")
  params = joined.split_projections(weights.model.cfg, weights.params)
  params = tree.quantize_params(quant, params)
  if head is not None:
    params = tree.quantize_head(params, head, group_size if head == scheme else -1)
  model = transformer.Transformer(dataclasses.replace(weights.model.cfg, quant=quant))
  model, params = generate.for_decoding(model, params)
  return dataclasses.replace(weights, model=model, params=params)


# --- Sides ---------------------------------------------------------------------------------------


class Plain:
  """Our jitted loop, `rounds` tokens a dispatch."""

  def __init__(self, weights: Weights, settings: Settings, *, rounds: int):
    self._decoder, self._rounds = (weights.model, weights.params), rounds
    self.num_bytes = trees.nbytes(weights.params)  # read by a decode step
    del settings  # XLA takes the cores of the process

  def run(self, prompt: Sequence[int], num_new: int) -> Timing:
    sampling = config.SamplingConfig(max_new_tokens=num_new)
    chunks = list(
      generate.stream(*self._decoder, [prompt], sampling, rounds_per_dispatch=self._rounds)
    )
    return Timing(
      tokens=[int(t) for chunk in chunks for t in chunk.tokens_BR[0]],
      first_s=chunks[0].seconds,
      rest_s=sum(chunk.seconds for chunk in chunks[1:]),
      compile_s=sum(chunk.compile_seconds for chunk in chunks),
    )


class LowBit(Plain):
  """Our jitted loop on codes."""

  def __init__(
    self,
    weights: Weights,
    settings: Settings,
    *,
    scheme: str,
    group_size: int = -1,
    head: str | None = None,
  ):
    weights = quantised(weights, scheme, group_size, head)
    super().__init__(weights, settings, rounds=generate.MAX_ROUNDS)


class ActOrder(Plain):
  """int4 codes with drawn groups of 64, as act order leaves them: sorted (the decoding form), or as
  files hold them, where every step makes floats of the kernels."""

  def __init__(self, weights: Weights, settings: Settings, *, is_sorted: bool):
    cfg = weights.model.cfg

    def one(path: str, w: Any, *, num_in: int, num_lead: int) -> qtensor.QTensor:
      del num_lead  # the decoding form has none
      seed = {"o": 1, "down": 2}.get(path.split("/")[-2], 0)  # q, k, v share theirs; gate and up
      order = np.random.default_rng(seed).permutation(int(np.prod(w.shape[:num_in])))
      flat = jnp.reshape(w, (len(order), *w.shape[num_in:]))[order]
      qt = qtensor.quantize(flat.reshape(w.shape), "int4", 64, num_in=num_in)
      return qtensor.unpack(qtensor.pack(qt).replace(order=jnp.asarray(order, jnp.int32)))

    params = joined.split_projections(cfg, weights.params)
    model, params = weights.model, tree.map_kernels(one, config.QuantConfig(), params)
    if is_sorted:
      model, params = generate.for_decoding(model, params)
    weights = dataclasses.replace(weights, model=model, params=params)
    super().__init__(weights, settings, rounds=generate.MAX_ROUNDS)


class NGram:
  """Our engine with prompt lookup: chains of `num_levels` tokens, plain where nothing matches."""

  def __init__(self, weights: Weights, settings: Settings, *, num_levels: int):
    cfg = config.EngineConfig(capacity=1024, min_prefix=-1)
    drafter = ngram.NGramDrafter(num_levels=num_levels)
    self._engine = engine.Engine(*weights.for_trees, cfg, drafter=drafter)
    del settings

  def run(self, prompt: Sequence[int], num_new: int) -> Timing:
    out = self._engine.generate([list(prompt)], config.SamplingConfig(max_new_tokens=num_new))
    stats = out.stats[0]
    return Timing(
      tokens=out.tokens[0],
      first_s=stats.prefill_seconds,
      rest_s=stats.decode_seconds,
      compile_s=stats.compile_seconds,
      accept=stats.mean_accepted,
    )


class Transformers:
  """transformers' Llama on torch, float32, our export of the same weights; a bare greedy loop."""

  def __init__(self, weights: Weights, settings: Settings):
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    self._torch = torch
    with tempfile.TemporaryDirectory() as folder:
      ckpt.save_hf(folder, weights.model, weights.params)
      load = transformers.AutoModelForCausalLM.from_pretrained
      self._model = load(folder, dtype=torch.float32).eval()

  def run(self, prompt: Sequence[int], num_new: int) -> Timing:
    torch = self._torch
    with torch.inference_mode():
      start = time.perf_counter()
      out = self._model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
      tokens = [int(out.logits[0, -1].argmax())]
      first = time.perf_counter()
      while len(tokens) < num_new:
        ids = torch.tensor([tokens[-1:]])
        out = self._model(ids, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return Timing(tokens=tokens, first_s=first - start, rest_s=time.perf_counter() - first)


class LlamaCpp:
  """llama.cpp on the GGUF as it is (`kind` None: 4-bit weights), or on our export of the same
  weights; float32 has a float32 key-value cache, others round activations to 8 bits."""

  def __init__(self, weights: Weights, settings: Settings, *, kind: str | None):
    import llama_cpp

    size = len(weights.prompt(settings.num_prompt, settings.text)) + settings.num_new
    more = dict(n_threads=settings.threads, n_threads_batch=settings.threads, verbose=False)
    if kind is None:
      if weights.path is None:
        raise ValueError("--shape: found random weights, expected --model for the file as it is")
      self._llama = llama_cpp.Llama(str(weights.path), n_ctx=size, **more)
      return
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "model.gguf"
      embedding = "f32" if kind == "f32" else "q8_0"
      arrays = (weights.model, weights.params, weights.tok)
      ckpt.save_gguf(path, *arrays, kind=kind, embedding_kind=embedding)
      self.num_bytes = path.stat().st_size
      more |= dict(use_mmap=False)
      more |= dict(type_k=0, type_v=0) if kind == "f32" else {}
      self._llama = llama_cpp.Llama(str(path), n_ctx=size, **more)

  def run(self, prompt: Sequence[int], num_new: int) -> Timing:
    start, tokens, first = time.perf_counter(), [], 0.0
    for token in self._llama.generate(list(prompt), temp=0.0, reset=True):
      tokens.append(int(token))
      if len(tokens) == 1:
        first = time.perf_counter()
      if len(tokens) == num_new:
        break
    end = time.perf_counter()
    self._llama.reset()
    return Timing(tokens=tokens, first_s=first - start, rest_s=end - first)


_OF_A_FILE = "llama.cpp, 4 bits"  # decodes the GGUF as it is
SIDES = {
  "ours, 1 token a dispatch": lambda *args: Plain(*args, rounds=1),
  "ours, 16 tokens a dispatch": lambda *args: Plain(*args, rounds=generate.MAX_ROUNDS),
  "ours, n-gram of 7": lambda *args: NGram(*args, num_levels=7),
  "ours, n-gram of 15": lambda *args: NGram(*args, num_levels=15),
  "transformers": Transformers,
  "llama.cpp, float32": lambda *args: LlamaCpp(*args, kind="f32"),
  "llama.cpp, 8 bits": lambda *args: LlamaCpp(*args, kind="q8_0"),
  "llama.cpp, Q4_0": lambda *args: LlamaCpp(*args, kind="q4_0"),
  _OF_A_FILE: lambda *args: LlamaCpp(*args, kind=None),
  "ours, int8": lambda *args: LowBit(*args, scheme="int8"),
  "ours, int4 in groups of 64": lambda *args: LowBit(*args, scheme="int4", group_size=64),
  "ours, ternary": lambda *args: LowBit(*args, scheme="ternary"),
  "ours, int8, head too": lambda *args: LowBit(*args, scheme="int8", head="int8"),
  **{
    f"ours, int4 in groups of 64, head {head}": functools.partial(
      LowBit, scheme="int4", group_size=64, head=head
    )
    for head in ("int8", "int4")
  },
  "ours, int4, act order": lambda *args: ActOrder(*args, is_sorted=True),
  "ours, int4, act order as stored": lambda *args: ActOrder(*args, is_sorted=False),
}
_OURS, _PEERS = "ours, 16 tokens a dispatch", ("transformers", "llama.cpp, float32")
SUITES = {
  "plain": ("ours, 1 token a dispatch", _OURS, *_PEERS, _OF_A_FILE),
  "speculative": (
    "ours, 1 token a dispatch",
    "ours, n-gram of 7",
    "ours, n-gram of 15",
    *_PEERS,
    _OF_A_FILE,
  ),
  "lowbit": (  # head: of a tied model the embedding too
    _OURS,
    *("ours, int8", "ours, int8, head too", "ours, int4 in groups of 64"),
    *("ours, int4 in groups of 64, head int8", "ours, int4 in groups of 64, head int4"),
    "ours, ternary",
    *("llama.cpp, float32", "llama.cpp, 8 bits", "llama.cpp, Q4_0"),
  ),
  "act_order": (
    _OURS,
    "ours, int4 in groups of 64",
    "ours, int4, act order",
    "ours, int4, act order as stored",
  ),
}
GPU = "gpu"  # the suite of _bench_gpu_suite
_NEEDS = {
  "transformers": ("torch", "transformers"),
  **dict.fromkeys((name for name in SIDES if name.startswith("llama.cpp")), ("llama_cpp",)),
}


# --- Measuring -----------------------------------------------------------------------------------


def unread(suite: str) -> tuple[str, ...]:
  """Flags of bench_decode that the suite does not read."""
  if suite == GPU:
    return ("model", "prompt_tokens", "new_tokens", "repeats")
  # Two whole texts are decoded: random weights have no tokenizer to read them with.
  texts = ("prompt_tokens", "shape") if suite == "speculative" else ()
  return (*texts, "parts", "weights", "compilers", "nodes", "contexts", "compile_only")


def on_texts(suite: str, settings: Settings) -> list[Settings]:
  """What the suite measures one after the other."""
  if suite != "speculative":
    return [settings]
  whole = dataclasses.replace(settings, num_prompt=None)
  return [dataclasses.replace(whole, text=text) for text in ("table", "free")]


def available(names: Sequence[str], *, is_random: bool = False) -> tuple[list[str], dict[str, str]]:
  """(sides that can run here, the others and why not); is_random: the weights are in no file."""
  missing = {
    name: f"{package} is not installed"
    for name in names
    for package in _NEEDS.get(name, ())
    if importlib.util.find_spec(package) is None
  }
  if is_random and _OF_A_FILE in names:
    missing[_OF_A_FILE] = "random weights are in no file"
  return [name for name in names if name not in missing], missing


def measure(
  weights: Weights, names: Sequence[str], settings: Settings, repeats: int
) -> list[dict[str, Any]]:
  """Medians of `repeats` rounds, the sides in turn; a round before compiles and warms up."""
  host_memory.keep()  # as generate and serve do
  prompt = weights.prompt(settings.num_prompt, settings.text)
  sides = {name: SIDES[name](weights, settings) for name in names}
  warm = {name: side.run(prompt, settings.num_new) for name, side in sides.items()}
  found = {name: [] for name in names}
  for _ in range(repeats):
    for name, side in sides.items():
      found[name].append(side.run(prompt, settings.num_new))
  expected = warm[names[0]].tokens
  rows = []
  for name, timings in found.items():
    first = statistics.median(t.first_s for t in timings)
    rest = statistics.median(t.rest_s for t in timings)
    same = [a == b for a, b in zip(timings[0].tokens, expected, strict=True)]
    rows.append(
      {
        "side": name,
        "text": settings.text,
        "prompt": len(prompt),
        "new": settings.num_new,
        "prefill tok/s": len(prompt) / first,
        "first token s": first,
        "decode tok/s": (settings.num_new - 1) / rest,
        "tokens a round": statistics.median(t.accept for t in timings),
        "compile s": warm[name].compile_s,
        "weights MB": getattr(sides[name], "num_bytes", 0) / 1e6,
        "equal tokens": same.index(False) if False in same else len(same),
        "load": os.getloadavg()[0],
      }
    )
  return rows
