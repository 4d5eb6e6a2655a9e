"""Text that a target writes itself, to train its drafts on; prompts out of files."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from minicpm_jax import config
from minicpm_jax.data import documents, packing, shards, sources
from minicpm_jax.infer import engine as engine_lib
from minicpm_jax.infer import generate
from minicpm_jax.text import chat

PROMPT_TOKENS = 32  # of a document, before the target goes on
MAX_PROMPT_TOKENS = 192  # of a chat; longer prompts are left out
BATCH = 64  # rows that are written side by side
PART = 256  # documents between two writes
HELDOUT = 64  # documents that only measure acceptance
SPLIT = 8  # FILE:held is every eighth row of a file of prompts, FILE:rest the others


ANSWER = ">"  # stands in a text between the ids of a prompt and those that the target wrote


class Ids:
  """A tokenizer whose text is token ids: generated tokens go into shards as they are.

  Ids before `ANSWER` are not trained.
  """

  bos_id = eos_id = pad_id = chat_template = None
  stop_ids, add_bos = (), False

  def __init__(self, vocab_size: int):
    self.vocab_size, self.special_tokens = vocab_size, {}

  def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
    return [int(word) for word in text.split() if word != ANSWER]

  def encode_with_mask(self, text: str) -> tuple[list[int], list[int]]:
    prompt, _, answer = text.rpartition(ANSWER)
    before, after = self.encode(prompt), self.encode(answer)
    return before + after, [0] * len(before) + [1] * len(after)

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    return " ".join(map(str, ids))

  def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = True) -> bytes:
    return self.decode(ids).encode()

  def save(self, folder: Any) -> None:
    (pathlib.Path(folder) / "ids").write_text(f"{self.vocab_size}")


def regenerate(
  cfg: config.DistillConfig, target: Any, workdir: pathlib.Path, values: flags.FlagValues
) -> config.DistillConfig:
  """`cfg` on documents that the target wrote, kept in WORKDIR/generated."""
  sampling = config.SamplingConfig(
    temperature=values.regenerate_temperature, max_new_tokens=values.regenerate_tokens
  )
  held_out = [s for s in cfg.data.sources if s.name in cfg.eval_sources]
  made, tested = (workdir / "generated" / name for name in ("train", "heldout"))
  if values.prompts:
    prompts = chat_prompts(values.prompts, target[2], values.regenerate + HELDOUT)
    cut = min(HELDOUT, len(prompts) // 2)
    test, train = prompts[:cut], prompts[cut : cut + values.regenerate]
  else:
    trained = [s.path for s in cfg.data.sources if s.name not in cfg.eval_sources]
    if held_out:
      train = list(beginnings(trained, values.regenerate, seed=0))
      test = list(beginnings([s.path for s in held_out], HELDOUT, seed=1))
    else:  # what only measures must not begin as what is trained on: greedy answers are the same
      both = list(beginnings(trained, values.regenerate + HELDOUT, seed=0))
      cut = min(HELDOUT, len(both) // 2)
      test, train = both[:cut], both[cut : cut + values.regenerate]
  write_generated(made, target, train, sampling)
  write_generated(tested, target, test, sampling)
  entries = {"generated": made, "generated_heldout": tested}
  weights, others = (("generated", 1.0),), held_out
  if values.prompts:  # documents were not begun: they stay in the mixture as they are
    weights += tuple(pair for phase in cfg.data.phases for pair in phase.weights)
    others = list(cfg.data.sources)
  own = [config.SourceConfig(name=name, path=str(path)) for name, path in entries.items()]
  data = dataclasses.replace(
    cfg.data, sources=(*others, *own), phases=(config.PhaseConfig(weights=weights),)
  )
  return dataclasses.replace(cfg, data=data, eval_sources=(*cfg.eval_sources, "generated_heldout"))


def write_generated(
  out: pathlib.Path, target: Any, prompts: Sequence[list[int]], sampling: config.SamplingConfig
) -> None:
  """A shard folder of prompts that the target has gone on with; kept if there.

  Only what the target wrote is trained (EAGLE: loss on the assistant's tokens).
  A stopped call goes on: finished documents stand in `out`.jsonl, one a line.
  """
  if (out / shards.INDEX_FILE).exists():
    return
  if not prompts:
    raise ValueError(f"{out.name}: found no prompts, expected some to go on with (--regenerate)")
  model, params, tok = target
  model, params = generate.for_decoding(model, params, num_rows=BATCH)
  capacity = generate.bucket(max(map(len, prompts)) + sampling.max_new_tokens)
  cfg = config.EngineConfig(
    capacity=capacity, max_batch=min(BATCH, len(prompts)), rounds_per_dispatch=2, min_prefix=-1
  )
  engine = engine_lib.Engine(model, params, cfg)
  out.parent.mkdir(parents=True, exist_ok=True)
  log = out.with_name(f"{out.name}.jsonl")
  texts = _finished(log)
  while len(texts) < len(prompts):
    some = prompts[len(texts) : len(texts) + PART]
    seeds = range(len(texts), len(texts) + len(some))
    stops = () if tok is None else tok.stop_ids
    answer = engine.generate(some, sampling, stop_ids=stops, seeds=list(seeds))
    new = [" ".join(map(str, (*p, ANSWER, *t))) for p, t in zip(some, answer.tokens, strict=True)]
    with open(log, "a", encoding="utf-8") as lines:
      lines.write("".join(json.dumps(text) + "\n" for text in new))
    texts += new
    print(f"{out}: {len(texts)} of {len(prompts)} documents", flush=True)
  ids = Ids(model.cfg.vocab_size)
  docs = documents.from_texts(texts[: len(prompts)])
  shards.prepare(docs, out, name=out.name, tokenizer=ids, add_eos=False)


def _finished(log: pathlib.Path) -> list[str]:
  if not log.exists():
    return []
  whole, _, cut = log.read_text(encoding="utf-8").rpartition("\n")
  if cut:  # the last write was not finished
    log.write_text(whole + "\n" if whole else "", encoding="utf-8")
  return [json.loads(line) for line in whole.splitlines()]


# --- Prompts -------------------------------------------------------------------------------------


def beginnings(paths: Sequence[str], num: int, seed: int) -> Iterator[list[int]]:
  """The first tokens of `num` documents, taken in turns from the sources in a shuffled order."""
  opened = [sources.open_source(f"source{i}", path) for i, path in enumerate(paths)]
  orders = [iter(np.random.default_rng(seed).permutation(len(s))) for s in opened]
  count = 0
  while count < num:
    any_left = False
    for source, order in zip(opened, orders, strict=True):
      index = next((i for i in order if len(source[int(i)]) >= PROMPT_TOKENS), None)
      if index is None or count == num:
        continue
      any_left, count = True, count + 1
      yield packing.split_mask(source[int(index)][:PROMPT_TOKENS])[0].tolist()
    if not any_left:
      return


def chat_prompts(paths: Sequence[str], tok: Any, num: int) -> list[list[int]]:
  """`num` prompts of JSONL files in turns, each file shuffled; fewer where they have fewer."""
  if tok is None:
    raise ValueError("--prompts: found a target without a tokenizer, expected one that has it")
  order = np.random.default_rng(0)
  files = [order.permutation(np.array(prompt_texts(path), object)) for path in paths]
  found: list[list[int]] = []
  for turn in range(max(map(len, files))):
    for texts in files:
      if turn < len(texts) and len(found) < num:
        ids = encode_prompt(tok, str(texts[turn]))
        found += [ids] if len(ids) <= MAX_PROMPT_TOKENS else []
  return found


def encode_prompt(tok: Any, text: str) -> list[int]:
  """Ids of one user turn, up to where the answer begins; plain text without a chat template."""
  if tok.chat_template:
    return list(chat.encode_chat([{"role": "user", "content": text}], tok))
  return list(tok.encode(text, add_bos=tok.add_bos))


def prompt_texts(path: str) -> list[str]:
  """What a user says first in each row of a JSONL file (.gz or not).

  messages or turns: the first of them; question behind its text where both are there; else prompt
  or text. FILE:held gives every `SPLIT`-th row of it, to measure on, FILE:rest the others, to train
  on.
  """
  file, colon, part = path.rpartition(":")
  if not colon or part not in ("held", "rest"):
    file, part = path, ""
  rows = [row for _, row in documents.json_rows(file)]
  if not rows:
    raise ValueError(f"{file}: found no rows, expected JSON lines with prompts")
  texts = [_prompt_text(file, i, row) for i, row in enumerate(rows)]
  if part == "held":
    return texts[::SPLIT]
  return [text for i, text in enumerate(texts) if not part or i % SPLIT]


def _prompt_text(path: str, index: int, row: dict[str, Any]) -> str:
  expected = "expected messages, turns, question, prompt or text"
  if not {"messages", "turns", "question", "prompt", "text"} & set(row):
    raise ValueError(f"{path}: row {index}: found fields {sorted(row)}, {expected}")
  try:
    if "messages" in row:
      text = row["messages"][0]["content"]
    elif "turns" in row:
      text = row["turns"][0]
    elif "question" in row and "text" in row:
      text = f"{row['text']}\n\n{row['question']}"
    else:
      text = next(row[name] for name in ("question", "prompt", "text") if name in row)
  except (LookupError, TypeError):
    text = None
  if not isinstance(text, str):
    raise ValueError(f"{path}: row {index}: found {row!r:.80} without a text, {expected}")
  return text
