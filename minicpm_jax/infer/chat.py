"""A conversation with a model: template, stop ids, streaming text, history.

Every turn renders the whole conversation again (a template may rewrite old turns); the engine
prefills what its cache does not begin with.
"""

import dataclasses
from collections.abc import Generator, Sequence

from minicpm_jax import config
from minicpm_jax.core import types
from minicpm_jax.infer import detokenize, generate
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.models import transformer
from minicpm_jax.text import chat as chat_text
from minicpm_jax.text import tokenizer

FIRST_CAPACITY = 2048  # cache slots, tokens
MINICPM5_VOCAB = 130560  # its template differs from plain ChatML


@dataclasses.dataclass
class Stats:
  """Counts and times of one answer; compilation is apart and never inside a rate."""

  prompt_tokens: int = 0
  new_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  compile_seconds: float = 0.0

  def add(self, chunk: generate.Chunk) -> None:
    if self.new_tokens == 0:
      self.prefill_seconds += chunk.seconds
    else:
      self.decode_seconds += chunk.seconds
    self.new_tokens += int((chunk.tokens_BR != generate.NO_TOKEN).sum())
    self.compile_seconds += chunk.compile_seconds

  def line(self) -> str:
    """'42 prompt tokens, prefill 350.1 tok/s, 8 new tokens, decode 24.0 tok/s, ...'."""
    prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
    decoded = self.new_tokens - 1  # the first comes out of the prefill
    decode = f"decode {decoded / self.decode_seconds:.1f} tok/s" if decoded > 0 else "no decode"
    return (
      f"{self.prompt_tokens} prompt tokens, prefill {prefill:.1f} tok/s, "
      f"{self.new_tokens} new tokens, {decode}, compilation {self.compile_seconds:.1f} s"
    )


def stop_ids(cfg: config.ModelConfig, tok: tokenizer.Tokenizer) -> tuple[int, ...]:
  """Stop ids of the config, the tokenizer and ChatML."""
  end = tok.special_tokens.get("<|im_end|>")
  return tuple(sorted({*cfg.stop_ids, *tok.stop_ids, *(() if end is None else (end,))}))


def template_for(cfg: config.ModelConfig, tok: tokenizer.Tokenizer) -> str:
  """The tokenizer's chat template, else the one its arch and special tokens tell (models.md 8)."""
  if tok.chat_template is not None:
    return tok.chat_template
  if "<|im_start|>" in tok.special_tokens:
    is_five = cfg.arch == "llama" and cfg.vocab_size == MINICPM5_VOCAB
    return chat_text.MINICPM5 if is_five else chat_text.CHATML
  if cfg.arch == "minicpm":
    return chat_text.MINICPM2
  raise ValueError(
    f"chat template: found none in the tokenizer and no <|im_start|> token (arch {cfg.arch!r}), "
    "expected one of them: generate from raw text instead"
  )


def stream_text(
  model: transformer.Transformer,
  params: types.Params,
  tok: tokenizer.Tokenizer,
  prompt: Sequence[int],
  sampling: config.SamplingConfig,
  *,
  stop: Sequence[str] = (),
  stats: Stats | None = None,
  engine: engine_lib.Engine | None = None,
) -> Generator[str]:
  """Text of one answer piece by piece, up to a stop token or one of the stop strings.

  At most max_position tokens in all.
  `engine` keeps its cache from answer to answer; its capacity bounds the answer too.
  """
  room = model.cfg.max_position - len(prompt)
  if room < 1:
    raise ValueError(
      f"prompt: found {len(prompt)} tokens, expected fewer than max_position "
      f"{model.cfg.max_position} (a chat can be reset)"
    )
  sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
  stops = stop_ids(model.cfg, tok)
  stats = Stats() if stats is None else stats
  stats.prompt_tokens += len(prompt)
  text = detokenize.TextStream(tok, stop_ids=stops, stop=stop)
  for chunk in generate.stream(model, params, [prompt], sampling, stop_ids=stops, engine=engine):
    stats.add(chunk)
    if piece := text.push([int(t) for t in chunk.tokens_BR[0]]):
      yield piece
    if text.finish_reason is not None:
      return
  if piece := text.finish("length"):
    yield piece


class Chat:
  """`say` returns an answer, `stream` yields it piece by piece, `reset` forgets the conversation.

  An answer that is interrupted (the stream closed early) stays in the history as far as it came.
  sampling: None is what the checkpoint's generation_config.json says, greedy where it has none.
  donate: `params` are given up, or they and their decoding form are both held (`for_decoding`).
  """

  def __init__(
    self,
    model: transformer.Transformer,
    params: types.Params,
    tok: tokenizer.Tokenizer | None,
    *,
    sampling: config.SamplingConfig | None = None,
    system: str | None = None,
    enable_thinking: bool | None = None,
    stop: Sequence[str] = (),
    donate: bool = False,
  ):
    if tok is None:
      raise ValueError("tok: found None, expected a tokenizer (the model folder holds none)")
    # What may be refused, before anything is given up.
    self.template = template_for(model.cfg, tok)
    if sampling is None:
      sampling = config.SamplingConfig.from_hf(model.cfg.generation or "{}")
    self.sampling = sampling
    self.model, self.params = generate.for_decoding(model, params, donate=donate)
    self.tok = tok
    self.system = system
    self.enable_thinking = enable_thinking
    self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
    self.stats = Stats()  # of the last answer
    self.messages: list[dict[str, str]] = []
    self._engine: engine_lib.Engine | None = None
    self.reset()

  def reset(self) -> None:
    self.messages = [{"role": "system", "content": self.system}] if self.system else []

  def stream(self, text: str) -> Generator[str]:
    """Pieces of the answer to `text` as they are decoded."""
    turn = {"role": "user", "content": text}
    prompt = chat_text.encode_chat(
      [*self.messages, turn],
      self.tok,
      template=self.template,
      enable_thinking=self.enable_thinking,
    )
    self.stats = Stats()
    pieces: list[str] = []
    try:
      for piece in stream_text(
        self.model,
        self.params,
        self.tok,
        prompt,
        self.sampling,
        stop=self.stop,
        stats=self.stats,
        engine=self._engine_for(len(prompt)),
      ):
        pieces.append(piece)
        yield piece
    finally:
      if self.stats.new_tokens:
        self.messages += [turn, {"role": "assistant", "content": "".join(pieces)}]

  def _engine_for(self, num_prompt: int) -> engine_lib.Engine | None:
    """The engine of this conversation; a larger one where the conversation has outgrown it."""
    limit = self.model.cfg.max_position
    needed = min(limit, num_prompt + self.sampling.max_new_tokens)
    if num_prompt < limit and (self._engine is None or self._engine.cfg.capacity < needed):
      capacity = min(limit, max(FIRST_CAPACITY, 2 * generate.bucket(needed)))
      self._engine = generate.make_engine(self.model, self.params, 1, max(2, capacity))
    return self._engine

  def say(self, text: str) -> str:
    """The answer to `text`."""
    return "".join(self.stream(text))
