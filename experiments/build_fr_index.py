"""The most frequent tokens of a corpus, for a draft's head (FR-Spec, inference.md section 11).

  python -m experiments.build_fr_index --tokenizer=DIR --corpus=en.jsonl.gz --corpus=zh.jsonl.gz \\
    --weights=0.6,0.4 --sizes=8192,16384,32768 --output=fr_index

Counts the tokens of every line of --corpus (files or folders that data.documents reads), mixes the
domains by --weights (default: by their number of tokens), and writes freq_SIZE.npy and CPM.cu's
freq_SIZE.pt. Stop ids and the markers of the chat template are always in; every list has exactly
SIZE ids. --sizes also takes shares of the vocabulary: 25%.
"""

import itertools
import math
import sys

from absl import flags

from experiments import _command
from minicpm_jax.data import documents
from minicpm_jax.infer import frspec
from minicpm_jax.text import tokenizer as tokenizer_lib

VALUES = flags.FlagValues()
_OWN = {"flag_values": VALUES}
flags.DEFINE_string("tokenizer", None, "Folder of the tokenizer (or of the model).", **_OWN)
flags.DEFINE_multi_string("corpus", [], "Text of one domain; repeatable.", **_OWN)
flags.DEFINE_list("weights", [], "Share of each --corpus.", **_OWN)
flags.DEFINE_list("sizes", ["25%"], "Ids to keep, or shares of the vocabulary.", **_OWN)
flags.DEFINE_string("output", None, "Folder of the lists.", **_OWN)
flags.DEFINE_integer(
  "vocab_size", None, "Of the model; else the tokenizer's.", lower_bound=1, **_OWN
)
flags.DEFINE_integer("max_lines", 1_000_000, "Lines read of each domain.", **_OWN)
flags.DEFINE_string("text_field", "text", "JSON key or Parquet column.", **_OWN)


def size_of(text: str, vocab_size: int) -> int:
  try:
    share = text.removesuffix("%")
    return round(float(share) / 100 * vocab_size) if share != text else int(text)
  except ValueError:
    raise ValueError(f"--sizes: found {text!r}, expected a number of ids or a share 25%") from None


def weights_of(texts: list[str], num: int) -> list[float]:
  """[] where none was given, else `num` numbers."""
  try:
    weights = [float(text) for text in texts]
  except ValueError:
    weights = [-1.0]
  if weights and (len(weights) != num or min(weights) < 0 or not 0 < sum(weights) < math.inf):
    found = ",".join(texts)
    raise ValueError(
      f"--weights: found {found}, expected {num} numbers >= 0 with a sum > 0, one a --corpus"
    )
  return weights


def _run() -> None:
  tok = tokenizer_lib.load_tokenizer(VALUES.tokenizer)
  if tok is None:
    raise ValueError(f"--tokenizer: found none in {VALUES.tokenizer}")
  vocab_size = VALUES.vocab_size or tok.vocab_size
  sizes = [size_of(text, vocab_size) for text in VALUES.sizes]  # before hours of counting
  if not sizes:
    raise ValueError("--sizes: found none, expected numbers of ids or shares like 25%")
  weights = weights_of(VALUES.weights, len(VALUES.corpus))
  counts = []
  for path in VALUES.corpus:
    docs = documents.read([path], text_field=VALUES.text_field, text_split="line")
    lines = itertools.chain.from_iterable(doc.text.splitlines() for doc in docs)
    lines = itertools.islice((line for line in lines if line.strip()), VALUES.max_lines)
    counts.append(frspec.count_tokens(map(tok.encode, lines), vocab_size))
    if not counts[-1].any():
      raise ValueError(f"--corpus: {path}: found no text, expected some")
    print(f"{path}: {counts[-1].sum():,} tokens, {(counts[-1] > 0).sum():,} of {vocab_size} ids")
  weights = weights or [float(c.sum()) for c in counts]
  mixed = frspec.mix(counts, weights)
  forced = frspec.forced_ids(tok)
  for size in sizes:
    ids = frspec.build_index(mixed, size, forced)
    paths = frspec.save_index(VALUES.output, ids)
    print(
      f"{len(ids):,} ids ({len(ids) / vocab_size:.1%} of the vocabulary) keep "
      f"{frspec.coverage(mixed, ids):.2%} of the tokens: {', '.join(map(str, paths))}"
    )


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("tokenizer", "corpus", "output"))


if __name__ == "__main__":
  sys.exit(main())
