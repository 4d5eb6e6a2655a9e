"""Shard folders: record bytes, index, resume, parallel equality, nothing half-written."""

import dataclasses
import hashlib
import inspect
import json
import os
import struct
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from minicpm_jax.data import documents, shards

BOS, EOS = 256, 257


class ByteTokenizer:
  """UTF-8 bytes as ids; picklable, as worker processes need it."""

  vocab_size, bos_id, eos_id, pad_id, stop_ids = 258, BOS, EOS, None, (EOS,)
  special_tokens: dict[str, int] = {}
  add_bos = True
  chat_template = None

  def __init__(self, salt=""):
    self.salt = salt

  def encode(self, text, *, add_bos=False):
    return [BOS] * add_bos + list(text.encode())

  def decode(self, ids, *, skip_special=True):
    return self.decode_bytes(ids).decode()

  def decode_bytes(self, ids, *, skip_special=True):
    return bytes(i for i in ids if i < 256)

  def save(self, folder):
    with open(os.path.join(folder, "bytes.txt"), "w") as file:
      file.write(self.salt)


TEXTS = [f"document {i} " + "é" * (i % 7) for i in range(40)]


def _sources():
  """Imported late: worker processes import this module, and grain takes seconds."""
  from minicpm_jax.data import sources

  return sources


def _docs(texts=TEXTS):
  return documents.from_texts(texts)


def _prepare(folder, docs=None, **kwargs):
  options = {"name": "toy", "tokenizer": ByteTokenizer(), "shard_bytes": 100} | kwargs
  return shards.prepare(_docs() if docs is None else docs, folder, **options)


@pytest.mark.smoke
def test_record_bytes_are_the_specified_ones():
  record = shards.encode_record([5, 70000, 0], source_id=7, flags=3)
  assert record == struct.pack("<4I3I", 1, 3, 7, 3, 5, 70000, 0)
  np.testing.assert_array_equal(shards.decode_record(record), [5, 70000, 0])


@pytest.mark.parametrize(
  "record, message",
  [
    (b"123", "found 3 bytes, expected a header of 16"),
    (struct.pack("<4I", 9, 0, 0, 0), "found record version 9, expected 1"),
    (struct.pack("<4I1I", 1, 2, 0, 0, 5), "found 4 bytes of ids, expected 8"),
  ],
)
def test_bad_records_are_refused(record, message):
  with pytest.raises(shards.ShardError, match=message):
    shards.decode_record(record)


@pytest.mark.parametrize("ids", [[-1], [2**31], [1.5], [3.0], [[1, 2]], [True], ["7"]])
def test_what_is_no_id_is_refused(ids):
  with pytest.raises(shards.ShardError, match="token id"):
    inspect.unwrap(shards.encode_record)(ids)  # without beartype's look at it


@pytest.mark.smoke
def test_prepare_writes_what_the_index_says(tmp_path):
  index = _prepare(tmp_path / "out", source_id=3)
  names = [f"toy-{i:05d}-of-{len(index.shards):05d}.arrayrecord" for i in range(len(index.shards))]
  assert len(names) > 3
  assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "index.json"])
  assert os.listdir(tmp_path) == ["out"]
  read = []
  for shard, name in zip(index.shards, names, strict=True):
    assert shard.file == name
    data = (tmp_path / "out" / name).read_bytes()
    assert shard.sha256 == hashlib.sha256(data).hexdigest()
    reader = array_record_module.ArrayRecordReader(str(tmp_path / "out" / name))
    assert "group_size:1," in reader.writer_options_string()
    records = reader.read_all()
    assert len(records) == shard.num_documents
    assert all(struct.unpack_from("<4I", r)[2:] == (3, 3) for r in records)
    read += [np.frombuffer(r[16:], "<u4").tolist() for r in records]
  assert read == [[BOS, *text.encode(), EOS] for text in TEXTS]
  body = json.loads((tmp_path / "out" / "index.json").read_text())
  assert body["num_documents"] == len(TEXTS)
  assert body["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
  assert body["num_tokens"] == body["text_bytes"] + 2 * len(TEXTS)
  assert shards.read_index(tmp_path / "out") == index


def test_bos_and_eos_by_config(tmp_path):
  _prepare(tmp_path / "out", add_bos=False, add_eos=False)
  source = _sources().ShardSource("toy", tmp_path / "out")
  assert source[3].tolist() == list(TEXTS[3].encode())


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
  """Also shows that worker processes (spawn) can be used."""
  one = _prepare(tmp_path / "one")
  monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])  # pytest's main: not ours
  two = _prepare(tmp_path / "two", num_workers=2)
  assert two == one


def test_documents_without_text_are_left_out_and_counted(tmp_path):
  index = _prepare(tmp_path / "out", _docs(["", "a", " \n", "b"]))
  assert (index.num_documents, index.shards[0].num_empty) == (2, 2)


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_empty_corpus(tmp_path, texts):
  with pytest.raises(documents.CorpusError, match="corpus toy: found no text"):
    _prepare(tmp_path / "out", _docs(texts))
  assert os.listdir(tmp_path) == []


def _failing_docs(after):
  yield from list(_docs())[:after]
  raise documents.CorpusError("x.jsonl: line 31: not JSON")


class Counting(ByteTokenizer):
  def __init__(self):
    super().__init__()
    self.calls = 0

  def encode(self, text, *, add_bos=False):
    self.calls += 1
    return super().encode(text)


def test_failed_run_leaves_no_index_and_a_rerun_keeps_finished_shards(tmp_path):
  straight = _prepare(tmp_path / "straight")
  out = tmp_path / "out"
  with pytest.raises(documents.CorpusError, match="line 31"):
    _prepare(out, _failing_docs(30))
  assert not out.exists()
  assert not (tmp_path / "out.partial" / "index.json").exists()
  tokenizer, kept = Counting(), []
  index = _prepare(out, tokenizer=tokenizer, on_shard=lambda info, was_kept: kept.append(was_kept))
  assert index == straight
  assert kept.count(True) >= 3 and kept == sorted(kept, reverse=True)
  first_new = sum(s.num_documents for s in index.shards[: kept.count(True)])
  assert tokenizer.calls == len(TEXTS) - first_new


def test_a_damaged_part_is_made_again(tmp_path):
  straight = _prepare(tmp_path / "straight")
  with pytest.raises(documents.CorpusError):
    _prepare(tmp_path / "out", _failing_docs(30))
  part = tmp_path / "out.partial" / "part-00001.arrayrecord"
  part.write_bytes(part.read_bytes()[:-1] + b"x")
  part.with_name("part-00002.json").write_text('{"config": ')
  kept = []
  index = _prepare(tmp_path / "out", on_shard=lambda info, was_kept: kept.append(was_kept))
  assert index == straight
  assert kept[:3] == [True, False, False]


def test_parts_of_another_config_or_text_are_not_kept(tmp_path):
  with pytest.raises(documents.CorpusError):
    _prepare(tmp_path / "out", _failing_docs(30))
  kept = []
  texts = ["changed", *TEXTS[1:]]
  _prepare(tmp_path / "out", _docs(texts), on_shard=lambda _, was_kept: kept.append(was_kept))
  assert not kept[0]
  with pytest.raises(documents.CorpusError):
    _prepare(tmp_path / "new", _failing_docs(30))
  _prepare(tmp_path / "new", add_bos=False, on_shard=lambda _, was_kept: kept.append(was_kept))
  straight = _prepare(tmp_path / "straight", add_bos=False)
  assert shards.read_index(tmp_path / "new") == straight


def test_finished_folder_is_kept_and_changes_are_refused(tmp_path):
  out = tmp_path / "out"
  index = _prepare(out)
  tokenizer = Counting()
  assert _prepare(out, tokenizer=tokenizer) == index
  assert tokenizer.calls == 0
  with pytest.raises(shards.ShardError, match="add_bos: found True, expected False"):
    _prepare(out, add_bos=False)
  with pytest.raises(shards.ShardError, match="tokenizer_hash"):
    _prepare(out, tokenizer=ByteTokenizer("another"))
  with pytest.raises(shards.ShardError, match=r"documents have changed \(1 shards differ\)"):
    _prepare(out, _docs([*TEXTS, "one more"]))
  assert shards.read_index(out) == index
  changed = _prepare(out, _docs(["only this"]), overwrite=True)
  assert (changed.num_documents, len(os.listdir(out))) == (1, 2)


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
  (tmp_path / "precious.txt").write_text("x")
  for overwrite in (False, True):
    with pytest.raises(shards.ShardError, match="found other files"):
      _prepare(tmp_path, overwrite=overwrite)
  assert (tmp_path / "precious.txt").exists()


def test_missing_short_and_altered_shards_are_named(tmp_path):
  index = _prepare(tmp_path / "out")
  path = tmp_path / "out" / index.shards[2].file
  data = path.read_bytes()
  path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
  with pytest.raises(shards.ShardError, match=rf"{path.name}: found sha256 \w+, expected \w+"):
    shards.verify(tmp_path / "out")
  path.write_bytes(data[:-5])
  with pytest.raises(shards.ShardError, match=rf"{path.name}: found {len(data) - 5}, expected"):
    shards.read_index(tmp_path / "out")
  path.unlink()
  with pytest.raises(shards.ShardError, match=rf"{path.name}: found no file"):
    _sources().ShardSource("toy", tmp_path / "out")
  with pytest.raises(shards.ShardError, match="no such file; experiments/prepare_data.py"):
    shards.read_index(tmp_path / "nowhere")


def test_tokenizer_without_eos(tmp_path):
  tokenizer = ByteTokenizer()
  tokenizer.eos_id = None
  with pytest.raises(shards.ShardError, match="tokenizer.eos_id: found None"):
    _prepare(tmp_path / "out", tokenizer=tokenizer)


def test_parquet_source(tmp_path):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  docs = [list(range(i, 2 * i + 1)) for i in range(25)]
  for file, part in (("a", docs[:20]), ("b", docs[20:])):
    table = pa.table({"tokens": pa.array(part, pa.list_(pa.int32())), "n": [1] * len(part)})
    pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=6)
  source = _sources().open_source("toy", tmp_path)
  order = np.random.default_rng(0).permutation(25)
  assert [source[int(i)].tolist() for i in order] == [docs[i] for i in order]
  assert source[0].dtype == np.int32
  assert "b.parquet row group 0 row 4" in source.describe(24)
  same = _sources().open_source("toy", tmp_path)
  assert same.identity == source.identity
  pq.write_table(pa.table({"tokens": [[1], []]}), tmp_path / "b.parquet")
  changed = _sources().open_source("toy", tmp_path)
  assert changed.identity != source.identity
  with pytest.raises(shards.ShardError, match="row group 0 row 1: found no or null tokens"):
    changed[21]
  pq.write_table(pa.table({"x": ["a"]}), tmp_path / "b.parquet")
  with pytest.raises(shards.ShardError, match="found integer-list columns"):
    _sources().open_source("toy", tmp_path / "b.parquet")


def test_shard_config_is_part_of_the_index(tmp_path):
  index = _prepare(tmp_path / "out")
  assert dataclasses.asdict(index.config)["shard_bytes"] == 100
  assert index.config.tokenizer_hash == shards.tokenizer_hash(ByteTokenizer())
  assert index.config.tokenizer_hash != shards.tokenizer_hash(ByteTokenizer("another"))


class Marked(ByteTokenizer):
  """ "<s>" in the text is BOS, unless the text is plain."""

  special_tokens = {"<s>": BOS}

  def encode(self, text, *, add_bos=False, parse_special=True):
    if not parse_special:
      return list(text.encode())
    parts = [list(part.encode()) for part in text.split("<s>")]
    return [i for n, part in enumerate(parts) for i in [BOS] * (n > 0) + part]


def test_special_tokens_in_raw_text_are_text(tmp_path):
  text = ["HTML knows <s>struck</s> text"]
  made = {}
  for parse in (False, True):
    folder = tmp_path / str(parse)
    option = {"parse_special": True} if parse else {}
    index = _prepare(folder, _docs(text), tokenizer=Marked(), **option)
    assert index.config.parse_special is parse
    made[parse] = _sources().open_source("toy", folder)[0].tolist()
  assert made[False] == [BOS, *text[0].encode(), EOS]
  assert made[True].count(BOS) == 2
  # A folder written before the field existed was made the other way: refused, not mixed.
  path = tmp_path / "True" / "index.json"
  body = json.loads(path.read_text())
  del body["config"]["parse_special"]
  path.write_text(json.dumps(body))
  with pytest.raises(shards.ShardError, match="parse_special: found True, expected False"):
    _prepare(tmp_path / "True", _docs(text), tokenizer=Marked())


CHATS = [
  [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello, <s> friend!"}],
  [{"role": "system", "content": "short"}, {"role": "user", "content": "2 + 2?"}]
  + [{"role": "assistant", "content": "4"}, {"role": "user", "content": "sure?"}]
  + [{"role": "assistant", "content": "yes"}],
]


def test_conversations_become_records_with_a_loss_mask(tmp_path):
  """Through files, packing and batches: trained are the tokens that `encode_with_mask` says."""
  pytest.importorskip("tokenizers")
  from minicpm_jax import config
  from minicpm_jax.data import iterator
  from minicpm_jax.text import masks, tokenizer

  tok = tokenizer.train_bpe(["user assistant hi hello friend sure yes"] * 9, 300)
  rows = [json.dumps({"id": str(i), "messages": chat}) for i, chat in enumerate(CHATS)]
  (tmp_path / "x.jsonl").write_text("\n".join(rows) + "\n")
  docs = documents.read([tmp_path / "x.jsonl"], text_field="messages")
  index = shards.prepare(docs, tmp_path / "out", name="sft", tokenizer=tok, is_chat=True)
  assert index.config.is_chat and not index.config.add_eos
  cfg = config.DataConfig(
    sources=(config.SourceConfig(name="sft", path=str(tmp_path / "out")),),
    seq_len=128,
    batch_size=1,
    packing="best_fit",
    num_threads=0,
  )
  batch = next(iterator.make_eval_iterator(cfg, "sft", 1))
  for number, chat in enumerate(CHATS, start=1):
    ids, mask = masks.encode_with_mask(chat, tok)
    here = batch["segment_ids"][0] == number
    assert batch["tokens"][0][here].tolist() == ids
    assert batch["loss_mask"][0][here].tolist() == [*mask[1:], 0]
  assert 0 < batch["loss_mask"].sum() < (batch["segment_ids"] > 0).sum()


def test_a_mask_of_another_length_and_bad_messages_are_refused(tmp_path):
  with pytest.raises(shards.ShardError, match="loss_mask: found 1 values, expected 2"):
    shards.encode_record([1, 2], loss_mask=[1])
  record = shards.encode_record([5, 6], loss_mask=[0, 1])
  assert record == struct.pack("<4I2I", 1, 2, 0, 4, 5 + 2**31, 6)
  for text in ("no json", '[{"role": "user"}]'):
    with pytest.raises(shards.ShardError, match="messages .*cannot be rendered"):
      _prepare(tmp_path / "out", _docs([text]), is_chat=True)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda body: body["shards"][0].update(num_documents=-1), "num_documents: found -1"),
    (lambda body: body["config"].update(vocab_size="x"), "index.json: not a shard index"),
    (lambda body: body.update(shards={"a": 1}), "not a shard index"),
    (lambda body: body.update(shards=[]), "index.json: shards: found none"),
  ],
)
def test_an_index_of_other_values_is_refused(tmp_path, change, message):
  docs = documents.from_texts(["hello world"])
  shards.prepare(docs, tmp_path / "s", name="s", tokenizer=ByteTokenizer())
  path = tmp_path / "s" / "index.json"
  body = json.loads(path.read_text())
  change(body)
  path.write_text(json.dumps(body))
  with pytest.raises(shards.ShardError, match=message):
    shards.read_index(tmp_path / "s")


def test_source_ids_fit_their_field():
  with pytest.raises(shards.ShardError, match="source_id: found -1"):
    shards.encode_record([1], source_id=-1)
