"""Raw text -> tokenised shards with index and hashes (data.md section 8), in parallel, resumable.

  python -m experiments.prepare_data --input=corpus/ --output=data/web --name=web \\
      --tokenizer=MiniCPM4-0.5B                       # a folder with tokenizer.json or .model
  python -m experiments.prepare_data --input=a.jsonl.zst --input=b.parquet --output=data/own \\
      --train_tokenizer_vocab=8192         # first trains a BPE on the text, OUTPUT-tokenizer

Reads .jsonl, .txt, .md (also .gz, .zst) and .parquet, files or folders; --text_field=messages reads
conversations (chat template, loss on the assistant only). The same command again goes on where a
stopped run ended. --heldout_permille=20 puts that share (by hash of the id) into OUTPUT-heldout.
"""

import pathlib
import sys
import time
from collections.abc import Iterator

from absl import flags

from experiments import _command
from minicpm_jax.data import documents, shards
from minicpm_jax.text import tokenizer as tokenizer_lib

_BPE_CHARS = 256 << 20  # from the start of the text, for a tokenizer
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
_FIELD = _flag(flags.DEFINE_string, "text_field", "text", "JSON key or Parquet column of the text.")
_SPLITS = ["file", "line", "paragraph"]
_SPLIT = _flag(flags.DEFINE_enum, "text_split", "file", _SPLITS, "Document of plain text.")
_BOS = _flag(flags.DEFINE_bool, "add_bos", None, "BOS in front; default: as the tokenizer says.")
_SPECIAL = _flag(flags.DEFINE_bool, "parse_special", False, '"<s>" in the text is BOS, not text.')
_HELDOUT = _flag(
  flags.DEFINE_integer, "heldout_permille", 0, "Documents in a thousand held out.", 0, 999
)
_SHARD_MB = _flag(flags.DEFINE_integer, "shard_mb", 32, "Text of one shard, MiB.")
_WORKERS = _flag(flags.DEFINE_integer, "num_workers", 1, "Processes that tokenise.")
_OVERWRITE = _flag(flags.DEFINE_bool, "overwrite", False, "Replace a finished folder.")


def _read(is_out: bool | None = None) -> Iterator[documents.Doc]:
  """All documents, or those that are (not) held out."""
  for doc in documents.read(_INPUT.value, text_field=_FIELD.value, text_split=_SPLIT.value):
    if is_out is None or documents.is_heldout(doc.id, _HELDOUT.value) == is_out:
      yield doc


def _tokenizer(output: pathlib.Path) -> tokenizer_lib.Tokenizer:
  if (_TOKENIZER.value is None) == (_VOCAB.value is None):
    raise ValueError("--tokenizer, --train_tokenizer_vocab: expected exactly one of them")
  folder = pathlib.Path(_TOKENIZER.value or f"{output}-tokenizer")
  is_new = _VOCAB.value is not None and not (folder / "tokenizer.json").exists()
  if is_new:
    print(f"training a BPE of {_VOCAB.value} tokens")
    texts = documents.head((doc.text for doc in _read()), _BPE_CHARS)
    tokenizer_lib.train_bpe(texts, _VOCAB.value).save(folder)
  loaded = tokenizer_lib.load_tokenizer(folder)
  if loaded is None:
    raise ValueError(f"--tokenizer: found no tokenizer.json or tokenizer.model in {folder}")
  if _VOCAB.value is not None:
    print(f"{folder}: {loaded.vocab_size} tokens{'' if is_new else ' (kept)'}")
  return loaded


def _prepare(docs: Iterator[documents.Doc], folder: pathlib.Path, name: str, tokenizer) -> None:
  start = time.time()

  def on_shard(info: shards.ShardInfo, was_kept: bool) -> None:
    kept = " (kept)" if was_kept else ""
    print(f"{info.file}: {_size(info)}{kept} after {time.time() - start:.1f} s")

  index = shards.prepare(
    docs,
    folder,
    name=name,
    tokenizer=tokenizer,
    add_bos=_BOS.value,
    parse_special=_SPECIAL.value,
    is_chat=_FIELD.value == "messages",
    shard_bytes=_SHARD_MB.value << 20,
    num_workers=_WORKERS.value,
    overwrite=_OVERWRITE.value,
    on_shard=on_shard,
  )
  ratio = index.text_bytes / max(index.num_tokens, 1)
  print(f"{folder}: {_size(index)}, {ratio:.2f} bytes a token, {len(index.shards)} shards")


def _size(counted: shards.ShardInfo | shards.Index) -> str:
  return f"{counted.num_documents:,} documents, {counted.num_tokens:,} tokens"


def _run() -> None:
  output = pathlib.Path(_OUTPUT.value)
  name = _NAME.value or output.name
  tokenizer = _tokenizer(output)
  for is_out in (False, True) if _HELDOUT.value else (False,):
    suffix = "-heldout" if is_out else ""
    _prepare(_read(is_out), output.with_name(output.name + suffix), name + suffix, tokenizer)


def main(argv: list[str] | None = None) -> int:
  """Status 0, or 1 and one line on stderr for bad input."""
  return _command.run(_run, VALUES, argv, needed=("input", "output"))


if __name__ == "__main__":
  sys.exit(main())
