"""Tokenised shards: ArrayRecord files with a JSON index (data.md section 8).

A folder holds NAME-00000-of-0000N.arrayrecord (group_size:1) and index.json. A record is a
16-byte header of four little-endian uint32 (version, document length, source id, flags) and the
token ids as little-endian uint32. With FLAG_MASK the top bit of an id says that the token is not
trained (what the user says in a conversation). `prepare` writes such a folder from documents.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from array_record.python import array_record_module

from minicpm_jax.config import validate
from minicpm_jax.core import files
from minicpm_jax.data import documents as documents_lib
from minicpm_jax.text import tokenizer as tokenizer_lib

VERSION = 1
FLAG_BOS, FLAG_EOS = 1, 2  # the document starts with BOS / ends with EOS
FLAG_MASK = 4  # top bits of the ids are a loss mask, inverted
INDEX_FILE = "index.json"
_HEADER = struct.Struct("<4I")
_MAX_ID = 2**31


class ShardError(ValueError):
  """A shard folder that is missing, damaged or not what the call needs."""


# ------------------------------------------------------------------------------ record format


def encode_record(
  ids: Sequence[int],
  *,
  source_id: int = 0,
  flags: int = 0,
  loss_mask: Sequence[int] | None = None,
) -> bytes:
  """Header and ids of one document; `loss_mask` is 1 on the tokens that are trained as targets."""
  array = np.asarray(ids)
  if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
    found = f"{array.dtype}{list(array.shape)} {ids!r:.60}"
    raise ShardError(f"token ids: found {found}, expected one row of integers")
  if array.size and (array.min() < 0 or array.max() >= _MAX_ID):
    raise ShardError(f"token id: found {array.min()}..{array.max()}, expected 0..{_MAX_ID - 1}")
  for name, value in (("source_id", source_id), ("flags", flags)):
    if not 0 <= value < 2**32:
      raise ShardError(f"{name}: found {value}, expected 0..{2**32 - 1}")
  array = array.astype(np.int64)
  if loss_mask is not None:
    if len(loss_mask) != len(array):
      raise ShardError(f"loss_mask: found {len(loss_mask)} values, expected {len(array)}")
    array = array | np.where(np.asarray(loss_mask, bool), 0, _MAX_ID)
    flags |= FLAG_MASK
  return _HEADER.pack(VERSION, len(array), source_id, flags) + array.astype("<u4").tobytes()


def decode_record(record: bytes, where: str = "record") -> np.ndarray:
  """The int32 token ids of one record; ShardError when header and payload disagree.

  Tokens that are not trained have the sign bit set: `packing.split_mask` takes them apart.
  """
  if len(record) < _HEADER.size:
    raise ShardError(f"{where}: found {len(record)} bytes, expected a header of {_HEADER.size}")
  version, length, _, _ = _HEADER.unpack_from(record)
  if version != VERSION:
    raise ShardError(f"{where}: found record version {version}, expected {VERSION}")
  if len(record) != _HEADER.size + 4 * length:
    raise ShardError(
      f"{where}: found {len(record) - _HEADER.size} bytes of ids, expected {4 * length}"
    )
  return np.frombuffer(record, dtype="<i4", offset=_HEADER.size)


# -------------------------------------------------------------------------------------- index


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
  """One shard: its file, what is in it, and the hash of the text it was made from."""

  file: str
  num_documents: int
  num_empty: int  # documents without text, left out
  num_tokens: int  # BOS and EOS included
  text_bytes: int  # UTF-8
  max_document: int  # tokens of the longest document
  file_bytes: int
  sha256: str
  input_sha256: str

  def __post_init__(self):
    validate.require_hints(self, "shard.", least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardConfig:
  """What determines the content of the shards beside the documents."""

  name: str
  tokenizer_hash: str
  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  add_bos: bool
  add_eos: bool
  source_id: int
  shard_bytes: int  # text of one shard, at least (the last one may be smaller)
  parse_special: bool = True  # "<s>" in the text became BOS; folders without the field did so
  is_chat: bool = False  # texts are messages: template, loss mask on what the assistant says

  def __post_init__(self):
    validate.require_hints(self, "shards.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
  """The content of index.json."""

  config: ShardConfig
  shards: tuple[ShardInfo, ...]

  @property
  def num_documents(self) -> int:
    return sum(s.num_documents for s in self.shards)

  @property
  def num_tokens(self) -> int:
    return sum(s.num_tokens for s in self.shards)

  @property
  def text_bytes(self) -> int:
    return sum(s.text_bytes for s in self.shards)

  @property
  def identity(self) -> str:
    """One hash for the whole content: that of the shards' hashes, in order."""
    return hashlib.sha256("\n".join(s.sha256 for s in self.shards).encode()).hexdigest()

  def as_json(self) -> str:
    totals = {k: getattr(self, k) for k in ("num_documents", "num_tokens", "text_bytes")}
    body = {"version": VERSION, **totals, "identity": self.identity} | dataclasses.asdict(self)
    return json.dumps(body, indent=1)


def read_index(folder: str | os.PathLike) -> Index:
  """The index of a shard folder; files that are missing or of another size are refused."""
  path = pathlib.Path(folder) / INDEX_FILE
  if not path.exists():
    raise ShardError(f"{path}: no such file; experiments/prepare_data.py writes shard folders")
  try:
    body = json.loads(path.read_text())
    version = body["version"]
    index = Index(
      config=ShardConfig(**body["config"]),
      shards=tuple(ShardInfo(**s) for s in body["shards"]),
    )
  except (KeyError, TypeError, ValueError) as error:
    raise ShardError(f"{path}: not a shard index ({error!r})") from None
  if version != VERSION:
    raise ShardError(f"{path}: found version {version}, expected {VERSION}")
  if not index.shards:
    raise ShardError(f"{path}: shards: found none, expected at least one")
  for shard in index.shards:
    file = path.parent / shard.file
    found = file.stat().st_size if file.exists() else "no file"
    if found != shard.file_bytes:
      raise ShardError(f"{file}: found {found}, expected {shard.file_bytes} bytes (see {path})")
  return index


def verify(folder: str | os.PathLike) -> Index:
  """Reads every shard and compares its sha256 with the index; ShardError names a bad file."""
  index = read_index(folder)
  for shard in index.shards:
    file = pathlib.Path(folder) / shard.file
    found = sha256_of(file)
    if found != shard.sha256:
      raise ShardError(f"{file}: found sha256 {found}, expected {shard.sha256}")
  return index


def sha256_of(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_hash(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """sha256 over the files that the tokenizer saves."""
  digest = hashlib.sha256()
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    for path in sorted(pathlib.Path(folder).iterdir()):
      digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
  return digest.hexdigest()


# ------------------------------------------------------------------------------------ writing


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """The documents of one shard."""

  number: int
  texts: list[str]
  num_empty: int
  text_bytes: int
  sha256: str


def _chunks(docs: Iterable[documents_lib.Doc], shard_bytes: int) -> Iterator[_Chunk]:
  """Cuts a stream into shards at document ends: depends on the texts only."""
  number, texts, empty, size, digest = 0, [], 0, 0, hashlib.sha256()
  for doc in docs:
    if not doc.text.strip():
      empty += 1
      continue
    data = doc.text.encode()
    digest.update(len(data).to_bytes(8, "little") + data)
    texts.append(doc.text)
    size += len(data)
    if size >= shard_bytes:
      yield _Chunk(number, texts, empty, size, digest.hexdigest())
      number, texts, empty, size, digest = number + 1, [], 0, 0, hashlib.sha256()
  if texts:
    yield _Chunk(number, texts, empty, size, digest.hexdigest())


def _write_shard(
  tokenizer: tokenizer_lib.Tokenizer, cfg: ShardConfig, chunk: _Chunk, folder: pathlib.Path
) -> ShardInfo:
  """Tokenises and writes one part file, then its description: both under final names only."""
  masks: list[list[int] | None] = [None] * len(chunk.texts)
  if cfg.is_chat:
    pairs = [_encode_chat(tokenizer, text) for text in chunk.texts]
    encoded, masks = [ids for ids, _ in pairs], [mask for _, mask in pairs]
  elif hasattr(tokenizer, "encode_with_mask"):
    pairs = [tokenizer.encode_with_mask(text) for text in chunk.texts]
    encoded, masks = [ids for ids, _ in pairs], [mask for _, mask in pairs]
  elif not cfg.parse_special:
    encoded = tokenizer_lib.encode_plain(tokenizer, chunk.texts)
  elif hasattr(tokenizer, "encode_batch"):
    encoded = tokenizer.encode_batch(chunk.texts)
  else:
    encoded = [tokenizer.encode(text) for text in chunk.texts]
  prefix = [cfg.bos_id] if cfg.add_bos else []
  suffix = [cfg.eos_id] if cfg.add_eos else []
  flags = FLAG_BOS * cfg.add_bos + FLAG_EOS * cfg.add_eos
  path = folder / f"part-{chunk.number:05d}.arrayrecord"
  lengths = []
  with files.replacing(path) as partial:
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    for ids, mask in zip(encoded, masks, strict=True):
      ids = [*prefix, *ids, *suffix]
      writer.write(encode_record(ids, source_id=cfg.source_id, flags=flags, loss_mask=mask))
      lengths.append(len(ids))
    writer.close()
  info = ShardInfo(
    file=path.name,
    num_documents=len(lengths),
    num_empty=chunk.num_empty,
    num_tokens=sum(lengths),
    text_bytes=chunk.text_bytes,
    max_document=max(lengths),
    file_bytes=path.stat().st_size,
    sha256=sha256_of(path),
    input_sha256=chunk.sha256,
  )
  body = {"config": dataclasses.asdict(cfg), "shard": dataclasses.asdict(info)}
  files.write(path.with_suffix(".json"), json.dumps(body))
  return info


def _encode_chat(tok: tokenizer_lib.Tokenizer, text: str) -> tuple[list[int], list[int]]:
  from minicpm_jax.text import masks

  try:
    return masks.encode_with_mask(json.loads(text), tok)
  except (ValueError, KeyError, TypeError) as error:
    raise ShardError(f"messages {text[:80]!r}: cannot be rendered ({error})") from error


_WORKER: dict = {}  # filled in each worker process by _init_worker


def _init_worker(tokenizer: tokenizer_lib.Tokenizer) -> None:
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool is the parallelism
  _WORKER["tokenizer"] = tokenizer


def _work(cfg: ShardConfig, chunk: _Chunk, folder: pathlib.Path) -> ShardInfo:
  return _write_shard(_WORKER["tokenizer"], cfg, chunk, folder)


def _finished(cfg: ShardConfig, chunk: _Chunk, folder: pathlib.Path) -> ShardInfo | None:
  """The description of a part that an earlier run finished, if it is intact and still right."""
  sidecar = folder / f"part-{chunk.number:05d}.json"
  if not sidecar.exists():
    return None
  try:
    body = json.loads(sidecar.read_text())
    body, info = body["config"], ShardInfo(**body["shard"])
  except (ValueError, KeyError, TypeError):  # damaged: the part is made again
    return None
  if body != dataclasses.asdict(cfg) or info.input_sha256 != chunk.sha256:
    return None
  renamed = sorted(folder.glob(f"{cfg.name}-{chunk.number:05d}-of-*.arrayrecord"))
  for path in [folder / info.file, *renamed]:
    if path.exists() and sha256_of(path) == info.sha256:
      return dataclasses.replace(info, file=path.name)
  return None


def prepare(
  docs: Iterable[documents_lib.Doc],
  folder: str | os.PathLike,
  *,
  name: str,
  tokenizer: tokenizer_lib.Tokenizer | str | os.PathLike,
  source_id: int = 0,
  add_bos: bool | None = None,
  add_eos: bool = True,
  parse_special: bool = False,
  is_chat: bool = False,
  shard_bytes: int = 32 << 20,
  num_workers: int = 1,
  overwrite: bool = False,
  on_shard: Callable[[ShardInfo, bool], None] | None = None,
) -> Index:
  """Tokenises documents into the shard folder `folder` and returns its index.

  Work is done in `folder.partial`, which becomes `folder` in one rename at the end: a failed run
  leaves no index, and a rerun keeps the shards whose text, config and sha256 still agree. A
  finished folder of the same documents and config is verified and kept. `tokenizer` is an object
  or a folder; `add_bos` None = what the tokenizer says; `parse_special` turns special tokens that
  are spelled out in the text into their ids (default: they are text); with `is_chat` every text is
  a JSON list of messages for the tokenizer's chat template, which brings its own BOS and end
  tokens, and only what the assistant says is trained; `num_workers` > 1 uses
  processes (the caller's main module must be importable). `on_shard(info, was_kept)` reports
  progress.
  The shards do not depend on `num_workers`.
  """
  folder = pathlib.Path(folder)
  if not re.fullmatch(r"[\w.-]+", name):
    raise ShardError(f"name: found {name!r}, expected letters, digits, '_', '-' and '.' only")
  if not isinstance(tokenizer, tokenizer_lib.Tokenizer):
    loaded = tokenizer_lib.load_tokenizer(tokenizer)
    if loaded is None:
      raise ShardError(f"{tokenizer}: found no tokenizer.json or tokenizer.model")
    tokenizer = loaded
  add_bos = tokenizer.add_bos if add_bos is None else add_bos
  if is_chat:
    add_bos = add_eos = False
  for wanted, field in ((add_bos, "bos_id"), (add_eos, "eos_id")):
    if wanted and getattr(tokenizer, field) is None:
      raise ShardError(f"tokenizer.{field}: found None, expected an id (add_{field[:3]} is set)")
  if not 0 <= source_id < 2**32:
    raise ShardError(f"source_id: found {source_id}, expected 0..{2**32 - 1}")
  if shard_bytes < 1 or num_workers < 0:
    raise ShardError(f"shard_bytes, num_workers: found {shard_bytes}, {num_workers}, expected > 0")
  cfg = ShardConfig(
    name=name,
    tokenizer_hash=tokenizer_hash(tokenizer),
    vocab_size=tokenizer.vocab_size,
    bos_id=tokenizer.bos_id,
    eos_id=tokenizer.eos_id,
    add_bos=add_bos,
    add_eos=add_eos,
    source_id=source_id,
    shard_bytes=shard_bytes,
    parse_special=parse_special,
    is_chat=is_chat,
  )
  report = on_shard or (lambda info, was_kept: None)
  if folder.exists() and any(folder.iterdir()):
    if not (folder / INDEX_FILE).exists():
      raise ShardError(f"{folder}: found other files, expected a shard folder or none")
    if not overwrite:
      return _check_finished(cfg, docs, folder, report)
  work = folder.with_name(folder.name + ".partial")
  work.mkdir(parents=True, exist_ok=True)
  try:
    shards = _write_parts(cfg, docs, work, tokenizer, num_workers, report)
  except BaseException:
    if not any(work.iterdir()):
      work.rmdir()  # nothing that a rerun could keep
    raise
  if not shards:
    shutil.rmtree(work)
    raise documents_lib.CorpusError(f"corpus {name}: found no text, expected at least one document")
  return _publish(cfg, shards, work, folder)


def _write_parts(
  cfg: ShardConfig,
  docs: Iterable[documents_lib.Doc],
  work: pathlib.Path,
  tokenizer: tokenizer_lib.Tokenizer,
  num_workers: int,
  report: Callable[[ShardInfo, bool], None],
) -> list[ShardInfo]:
  shards = []
  if num_workers <= 1:
    for chunk in _chunks(docs, cfg.shard_bytes):
      kept = _finished(cfg, chunk, work)
      shards.append(kept or _write_shard(tokenizer, cfg, chunk, work))
      report(shards[-1], kept is not None)
    return shards
  context = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(
    num_workers, context, initializer=_init_worker, initargs=(tokenizer,)
  )
  pending: collections.deque = collections.deque()

  def collect():
    kept, future = pending.popleft()
    shards.append(kept or future.result())
    report(shards[-1], kept is not None)

  try:
    for chunk in _chunks(docs, cfg.shard_bytes):
      kept = _finished(cfg, chunk, work)
      pending.append((kept, None if kept else pool.submit(_work, cfg, chunk, work)))
      if len(pending) > num_workers + 1:  # bounds the text held in memory
        collect()
    while pending:
      collect()
  finally:
    pool.shutdown(cancel_futures=True)
  return shards


def _publish(
  cfg: ShardConfig, shards: list[ShardInfo], work: pathlib.Path, folder: pathlib.Path
) -> Index:
  """Final names, index, one rename; what else lay in the work folder goes last."""
  final = []
  for number, info in enumerate(shards):
    file = f"{cfg.name}-{number:05d}-of-{len(shards):05d}.arrayrecord"
    os.replace(work / info.file, work / file)
    final.append(dataclasses.replace(info, file=file))
  index = Index(config=cfg, shards=tuple(final))
  files.write(work / INDEX_FILE, index.as_json())
  if folder.exists():
    shutil.rmtree(folder)
  os.replace(work, folder)
  wanted = {INDEX_FILE, *(s.file for s in final)}
  for path in folder.iterdir():
    if path.name not in wanted:
      path.unlink()
  return index


def _check_finished(
  cfg: ShardConfig,
  docs: Iterable[documents_lib.Doc],
  folder: pathlib.Path,
  report: Callable[[ShardInfo, bool], None],
) -> Index:
  index = verify(folder)
  advice = "choose another folder, or overwrite it"
  for field in dataclasses.fields(ShardConfig):
    found, expected = getattr(index.config, field.name), getattr(cfg, field.name)
    if found != expected:
      raise ShardError(f"{folder}: {field.name}: found {found!r}, expected {expected!r}; {advice}")
  found = [s.input_sha256 for s in index.shards]
  given = [c.sha256 for c in _chunks(docs, cfg.shard_bytes)]
  if found != given:
    changed = sum(a != b for a, b in zip(found, given, strict=False)) + abs(len(found) - len(given))
    raise ShardError(f"{folder}: the documents have changed ({changed} shards differ); {advice}")
  for shard in index.shards:
    report(shard, True)
  return index
