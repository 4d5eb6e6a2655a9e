"""Raw text -> tokenised shards with index and hashes (data.md section 8), in parallel, resumable.

  python -m experiments.prepare_data --input=corpus/ --output=data/web --name=web \\
      --tokenizer=MiniCPM4-0.5B                       # a folder with tokenizer.json or .model
  python -m experiments.prepare_data --input=a.jsonl.zst --input=b.parquet --output=data/own \\
      --train_tokenizer_vocab=8192                    # trains a BPE on the text first

Reads .jsonl (.gz, .zst), .parquet, .txt and .md (.gz, .zst), files or folders. A stopped run goes
on where it stopped when the same command is given again. With --heldout_permille=20 that share of
the documents (by the hash of their id) goes to OUTPUT-heldout, for evaluation.
"""

import itertools
import pathlib
import sys
import time
from collections.abc import Iterator

from absl import flags

from minicpm_jax.data import documents, shards
from minicpm_jax.text import tokenizer as tokenizer_lib

VALUES = flags.FlagValues()  # own set: other scripts have flags of the same names


def _flag(define, *args):
  return define(*args, flag_values=VALUES)


_INPUT = _flag(flags.DEFINE_multi_string, "input", [], "File or folder of text; repeatable.")
_OUTPUT = _flag(flags.DEFINE_string, "output", None, "Folder to write.")
_NAME = _flag(flags.DEFINE_string, "name", None, "Name of the source; default: the folder's.")
_TOKENIZER = _flag(flags.DEFINE_string, "tokenizer", None, "Folder of a tokenizer.")
_VOCAB = _flag(
  flags.DEFINE_integer, "train_tokenizer_vocab", None, "Size of a BPE to train, instead."
)
_TRAIN_MB = _flag(flags.DEFINE_integer, "train_tokenizer_mb", 256, "Text it is trained on, MiB.")
_FIELD = _flag(flags.DEFINE_string, "text_field", "text", "JSON key or Parquet column of the text.")
_SPLIT = _flag(
  flags.DEFINE_enum, "text_split", "file", ["file", "line", "paragraph"], "Document of plain text."
)
_BOS = _flag(flags.DEFINE_bool, "add_bos", None, "BOS in front; default: as the tokenizer says.")
_HELDOUT = _flag(flags.DEFINE_integer, "heldout_permille", 0, "Documents in a thousand held out.")
_SHARD_MB = _flag(flags.DEFINE_integer, "shard_mb", 32, "Text of one shard, MiB.")
_WORKERS = _flag(flags.DEFINE_integer, "num_workers", 1, "Processes that tokenise.")
_OVERWRITE = _flag(flags.DEFINE_bool, "overwrite", False, "Replace a finished folder.")


def _read() -> Iterator[documents.Doc]:
  return documents.read(_INPUT.value, text_field=_FIELD.value, text_split=_SPLIT.value)


def _texts(docs: Iterator[documents.Doc], limit: int) -> Iterator[str]:
  size = 0
  for doc in docs:
    if size >= limit:
      return
    size += len(doc.text.encode())
    yield doc.text


def _tokenizer(output: pathlib.Path) -> tokenizer_lib.Tokenizer:
  if (_TOKENIZER.value is None) == (_VOCAB.value is None):
    raise ValueError("--tokenizer, --train_tokenizer_vocab: expected exactly one of them")
  folder = pathlib.Path(_TOKENIZER.value or f"{output}-tokenizer")
  if _VOCAB.value is not None and not (folder / "tokenizer.json").exists():
    print(f"training a BPE of {_VOCAB.value} tokens")
    tokenizer_lib.train_bpe(_texts(_read(), _TRAIN_MB.value << 20), _VOCAB.value).save(folder)
  loaded = tokenizer_lib.load_tokenizer(folder)
  if loaded is None:
    raise ValueError(f"--tokenizer: found no tokenizer.json or tokenizer.model in {folder}")
  return loaded


def _prepare(docs: Iterator[documents.Doc], folder: pathlib.Path, name: str, tokenizer) -> None:
  start, counter, tokens = time.time(), itertools.count(1), 0

  def on_shard(info: shards.ShardInfo, was_kept: bool) -> None:
    nonlocal tokens
    tokens += info.num_tokens
    print(
      f"{name} shard {next(counter)}: {info.num_documents:,} documents, {info.num_tokens:,} tokens"
      f"{' (kept)' if was_kept else ''}; {tokens / (time.time() - start + 1e-9):,.0f} tokens/s"
    )

  index = shards.prepare(
    docs,
    folder,
    name=name,
    tokenizer=tokenizer,
    add_bos=_BOS.value,
    shard_bytes=_SHARD_MB.value << 20,
    num_workers=_WORKERS.value,
    overwrite=_OVERWRITE.value,
    on_shard=on_shard,
  )
  print(
    f"{folder}: {index.num_documents:,} documents, {index.num_tokens:,} tokens, "
    f"{index.text_bytes / max(index.num_tokens, 1):.2f} bytes a token, {len(index.shards)} shards"
  )


def main(argv: list[str]) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  try:
    rest = VALUES([a for a in argv if a != "--help"])[1:]
    if "--help" in argv:
      print(__doc__, VALUES.get_help())
      return 0
    if rest or not _INPUT.value or not _OUTPUT.value:
      raise ValueError(f"--input and --output are needed, and flags only; found {rest}")
    output = pathlib.Path(_OUTPUT.value)
    name, permille = _NAME.value or output.name, _HELDOUT.value
    tokenizer = _tokenizer(output)
    train = (d for d in _read() if not documents.is_heldout(d.id, permille))
    _prepare(train, output, name, tokenizer)
    if permille:
      heldout = (d for d in _read() if documents.is_heldout(d.id, permille))
      folder = output.with_name(f"{output.name}-heldout")
      _prepare(heldout, folder, f"{name}-heldout", tokenizer)
  except (ValueError, ImportError, flags.Error) as error:
    print(f"prepare_data: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
