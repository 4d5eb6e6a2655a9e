"""The seven tests of data.md section 8 (the fifth, with the model, is in test_packed_loss.py)."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from minicpm_jax import config
from minicpm_jax.data import iterator, shards
from tests import words

EOS = 1


class _Tok(words.NumberTokenizer):
  """Any number is a token; only the name and the hash matter here."""

  vocab_size = 10**6

  def save(self, folder):
    with open(f"{folder}/name", "w") as file:
      file.write(type(self).__name__)


class _OtherTok(_Tok):
  pass


def write_source(folder, name, docs, tokenizer=None):
  """A shard folder of documents given as token ids."""
  from minicpm_jax.data import documents

  texts = [" ".join(map(str, doc)) for doc in docs]
  return shards.prepare(
    documents.from_texts(texts),
    folder / name,
    name=name,
    tokenizer=tokenizer or _Tok(),
    add_eos=False,
    shard_bytes=2000,
  )


def documents_of(seed, count, low, high, start):
  """Documents whose tokens are all different, numbered from `start`."""
  sizes = np.random.default_rng(seed).integers(low, high, count)
  edges = np.cumsum([start, *sizes])
  return [list(range(a, b)) for a, b in zip(edges, edges[1:], strict=False)]


A = documents_of(0, 60, 3, 40, 10)  # about 1,250 tokens
B = documents_of(1, 50, 3, 40, 100_000)
C = documents_of(2, 30, 3, 40, 200_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("sources")
  for name, docs in (("a", A), ("b", B), ("c", C)):
    write_source(path, name, docs)
  return path


def make_config(folder, weights=(("a", 1.0),), phases=None, **kwargs):
  names = sorted(
    {name for w in ([weights] if phases is None else phases.values()) for name, _ in w}
  )
  if phases is None:
    phases = {0: weights}
  return config.DataConfig(
    sources=tuple(config.SourceConfig(name=n, path=str(folder / n)) for n in names),
    phases=tuple(
      config.PhaseConfig(name=f"p{start}", start_step=start, weights=tuple(w))
      for start, w in phases.items()
    ),
    **({"seq_len": 32, "batch_size": 4, "num_threads": 0, "prefetch": 0} | kwargs),
  )


def take(it, count):
  return [next(it) for _ in range(count)]


def equal(first, second):
  return all(
    sorted(x) == sorted(y) and all(np.array_equal(x[k], y[k]) for k in x)
    for x, y in zip(first, second, strict=True)
  )


def tokens_of(batches, source=None):
  """Tokens in the order of rows; optionally of one source only."""
  found = []
  for batch in batches:
    keep = batch["segment_ids"] > 0
    if source is not None:
      keep &= batch["source_ids"] == source
    found += batch["tokens"][keep].tolist()
  return found


# -------------------------------------------------------------------- (1) every token once an epoch


@pytest.mark.smoke
@pytest.mark.parametrize("shuffle", [True, False])
def test_concat_reads_every_token_once_an_epoch(folder, shuffle):
  it = iterator.make_iterator(make_config(folder, shuffle=shuffle, batch_size=1))
  total = sum(map(len, A))
  stream = tokens_of(take(it, 2 * total // 32 + 1))
  epoch_1, epoch_2 = stream[:total], stream[total : 2 * total]
  everything = [t for doc in A for t in doc]
  assert sorted(epoch_1) == sorted(epoch_2) == everything
  if shuffle:
    assert epoch_1 != epoch_2 != everything
  else:
    assert epoch_1 == epoch_2 == everything
  assert it.epochs()["a"] >= 2


def test_best_fit_reads_every_token_once_an_epoch(folder):
  cfg = make_config(folder, packing="best_fit", batch_size=1, num_packing_bins=4)
  it = iterator.make_iterator(cfg)
  seen = collections.Counter()
  while it.epochs()["a"] < 3:
    seen.update(tokens_of([next(it)]))
  assert set(seen) == {t for doc in A for t in doc}
  assert set(seen.values()) <= {3, 4}  # the packer's group reaches into the next epoch


# ------------------------------------------------------------------------------- (2) resume exactly

PHASES = {0: (("a", 0.7), ("b", 0.3)), 12: (("a", 0.2), ("b", 0.4), ("c", 0.4))}


@pytest.mark.smoke
@pytest.mark.parametrize("packing, prefetch", [("concat", 0), ("concat", 2), ("best_fit", 2)])
@pytest.mark.parametrize("save_at", [0, 5, 12, 13])
def test_resume_gives_the_next_twenty_batches(folder, packing, save_at, prefetch):
  cfg = make_config(folder, phases=PHASES, packing=packing, prefetch=prefetch, num_threads=prefetch)
  straight = iterator.make_iterator(cfg)
  take(straight, save_at)
  state = json.loads(json.dumps(straight.get_state()))
  expected = take(straight, 20)
  resumed = iterator.make_iterator(cfg)
  take(resumed, 3)  # a used iterator can be set as well
  resumed.set_state(state)
  assert resumed.get_state() == state
  assert equal(take(resumed, 20), expected)
  assert len(json.dumps(state["cursors"])) < 250
  straight.close()
  resumed.close()


def test_state_is_that_of_the_last_batch_returned(folder):
  """Prefetched batches are not counted."""
  plain = iterator.make_iterator(make_config(folder, phases=PHASES))
  ahead = iterator.make_iterator(make_config(folder, phases=PHASES, prefetch=4))
  for _ in range(15):
    assert equal([next(plain)], [next(ahead)])
    assert plain.get_state() == ahead.get_state()
  ahead.close()


def test_grain_checkpoint_in_orbax(folder, tmp_path):
  import grain
  import orbax.checkpoint as ocp

  cfg = make_config(folder, phases=PHASES)
  it = iterator.make_iterator(cfg)
  take(it, 7)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(it)))
    manager.wait_until_finished()
    other = iterator.make_iterator(cfg)
    args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other))
    manager.restore(7, args=args)
  assert equal(take(other, 5), take(it, 5))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_phase_change_continues_every_source(folder, packing):
  """What source "a" gives is the same stream as if it were read alone: no repeat, no skip."""
  cfg = make_config(folder, phases=PHASES, packing=packing, batch_size=1)
  it = iterator.make_iterator(cfg)
  mixed = take(it, 60)
  assert it.phase_name == "p12"
  for number, name in enumerate("abc"):
    alone = iterator.make_iterator(
      make_config(folder, weights=((name, 1.0),), packing=packing, batch_size=1)
    )
    rows = [b["tokens"] for b in mixed if b["source_ids"][0, 0] == number]
    assert len(rows) > 5
    assert np.array_equal(rows, [b["tokens"] for b in take(alone, len(rows))])


def test_phase_name_and_shares_of_both_phases(folder):
  cfg = make_config(folder, phases={0: (("a", 0.7), ("b", 0.3)), 100: (("a", 0.2), ("b", 0.8))})
  it = iterator.make_iterator(cfg)
  assert it.phase_name == "p0"
  for start, name, share in ((0, "p0", 0.7), (100, "p100", 0.2)):
    rows = [int(row[0]) for b in take(it, 100) for row in b["source_ids"]]
    assert it.step == start + 100
    assert it.phase_name == name
    assert rows.count(0) / len(rows) == pytest.approx(share, abs=1 / len(rows))


# ----------------------------------------------------------------------------- (3) shares of tokens


def test_token_shares_over_two_thousand_rows(folder):
  weights = (("a", 0.5), ("b", 0.37), ("c", 0.13))
  it = iterator.make_iterator(make_config(folder, weights=weights, batch_size=8))
  counts = collections.Counter()
  for batch in take(it, 250):
    ids, n = np.unique(batch["source_ids"][batch["segment_ids"] > 0], return_counts=True)
    counts.update(dict(zip(ids.tolist(), n.tolist(), strict=True)))
    assert {0: "a", 1: "b", 2: "c"}  # source_ids are places in cfg.sources
  total = sum(counts.values())
  for number, (_, weight) in enumerate(weights):
    assert counts[number] / total == pytest.approx(weight, abs=0.005)


def test_source_ids_name_the_tokens(folder):
  it = iterator.make_iterator(make_config(folder, weights=(("a", 1.0), ("c", 1.0))))
  for batch in take(it, 5):
    is_a = batch["tokens"] < 100_000
    assert (batch["source_ids"] == np.where(is_a, 0, 1)).all()


# ---------------------------------------------------------------------------------------- (4) hosts


@pytest.mark.smoke
def test_two_hosts_are_disjoint_and_together_cover(folder):
  cfg = make_config(folder, batch_size=2)
  seen = []
  for host in range(2):
    it = iterator.make_iterator(cfg, process_index=host, process_count=2)
    tokens = set()
    while it.epochs()["a"] < 1:
      batch = next(it)
      assert batch["tokens"].shape == (1, 32)
      tokens.update(tokens_of([batch]))
    seen.append(tokens)
  assert not seen[0] & seen[1]
  assert seen[0] | seen[1] == {t for doc in A for t in doc}


def test_hosts_share_the_mixture_without_seeing_one_source_only(folder):
  """Two hosts, one row each, equal weights: plain alternation would give each one source."""
  cfg = make_config(folder, weights=(("a", 1.0), ("b", 1.0)), batch_size=2)
  hosts = [iterator.make_iterator(cfg, process_index=h, process_count=2) for h in range(2)]
  counts = np.zeros((2, 2), int)
  for _ in range(200):
    step = [int(next(it)["source_ids"][0, 0]) for it in hosts]
    assert sorted(step) == [0, 1]
    for host, source in enumerate(step):
      counts[host, source] += 1
  assert (counts > 60).all()


def test_batch_size_per_host(folder):
  cfg = make_config(folder, batch_size=6)
  assert next(iterator.make_iterator(cfg, process_count=3))["tokens"].shape == (2, 32)
  assert next(iterator.make_iterator(cfg, batch_size_per_host=5))["tokens"].shape == (5, 32)
  with pytest.raises(ValueError, match="data.batch_size: found 6, expected a multiple of 4"):
    iterator.make_iterator(cfg, process_count=4)


# ----------------------------------------------------------------------------------- (6) throughput


def test_throughput_is_reported(tmp_path, capsys):
  """data.md asks for >= 1M tokens/s/core and no gate; a floor of a tenth catches accidents."""
  sizes = np.random.default_rng(0).integers(200, 1400, 300)
  write_source(tmp_path, "a", [list(range(10, 10 + n)) for n in sizes])
  it = iterator.make_iterator(make_config(tmp_path, seq_len=1024, batch_size=8))
  take(it, 5)
  start = time.process_time()
  take(it, 60)
  rate = 60 * 8 * 1024 / (time.process_time() - start)
  with capsys.disabled():
    print(f"\n[data] {rate / 1e6:.2f}M tokens/s/core with run-time type checks on")
  assert rate > 1e5


# ------------------------------------------------------------------------------------- (7) refusals


@pytest.mark.smoke
@pytest.mark.parametrize(
  "field, change, hosts",
  [
    ("seq_len", {"seq_len": 64}, 1),
    ("packing", {"packing": "best_fit"}, 1),
    ("seed", {"seed": 1}, 1),
    ("shuffle", {"shuffle": False}, 1),
    ("align", {"align": 8}, 1),
    ("weights", {"phases": {0: (("a", 0.6), ("b", 0.4))}}, 1),
    ("weights", {"phases": {0: (("a", 0.7), ("b", 0.3)), 4: (("a", 1.0),)}}, 1),
    ("process_count", {}, 2),
  ],
)
def test_restore_under_another_config_is_refused(folder, field, change, hosts):
  base = {"phases": {0: (("a", 0.7), ("b", 0.3))}}
  it = iterator.make_iterator(make_config(folder, **base))
  take(it, 5)
  other = iterator.make_iterator(
    make_config(folder, **(base | change)), process_index=0, process_count=hosts
  )
  with pytest.raises(
    iterator.DataStateError, match=rf"state of step 5: {field}: found .* expected"
  ):
    other.set_state(it.get_state())
  other.set_state(it.get_state(), force=True)
  next(other)


def test_restore_on_another_host_is_refused(folder):
  cfg = make_config(folder)
  first = iterator.make_iterator(cfg, process_index=0, process_count=2)
  second = iterator.make_iterator(cfg, process_index=1, process_count=2)
  with pytest.raises(iterator.DataStateError, match="process_index: found 0"):
    second.set_state(first.get_state())


def test_restore_with_changed_source_content_is_refused(folder, tmp_path):
  it = iterator.make_iterator(make_config(folder))
  next(it)
  write_source(tmp_path, "a", [*A[:-1], [7, 8, 9]])
  other = iterator.make_iterator(make_config(tmp_path))
  with pytest.raises(iterator.DataStateError, match="sources: found"):
    other.set_state(it.get_state())


def test_best_fit_fields_are_compared(folder):
  it = iterator.make_iterator(make_config(folder, packing="best_fit"))
  other = iterator.make_iterator(make_config(folder, packing="best_fit", num_packing_bins=3))
  with pytest.raises(iterator.DataStateError, match="num_packing_bins: found 16"):
    other.set_state(it.get_state())


def test_a_branch_may_add_a_phase_and_a_source_ahead(folder):
  """A stable trunk knows nothing of the decay mixture that a branch starts at its last step."""
  trunk = make_config(folder, phases={0: (("a", 1.0),)})
  branch = make_config(folder, phases={0: (("a", 1.0),), 6: (("a", 0.5), ("c", 0.5))})
  whole = iterator.make_iterator(branch)
  it = iterator.make_iterator(trunk)
  take(whole, 6)
  take(it, 6)
  resumed = iterator.make_iterator(branch)
  resumed.set_state(it.get_state())
  assert equal(take(resumed, 10), take(whole, 10))


# ----------------------------------------------------------------------------------------- the rest


@pytest.mark.slow  # spawn takes 5-10 s
def test_worker_processes_do_not_change_the_order(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])  # spawn imports it again
  plain = iterator.make_iterator(make_config(folder))
  expected = take(plain, 8)
  it = iterator.make_iterator(make_config(folder, num_workers=1, prefetch=1))
  try:
    assert equal(take(it, 5), expected[:5])
    state = it.get_state()
    it.set_state(state)
    assert equal(take(it, 3), expected[5:])
  finally:
    it.close()
  plain.set_state(state)  # and a state does not depend on it either
  assert equal(take(plain, 3), expected[5:])


def test_a_document_longer_than_a_row_is_refused_by_source_and_document(folder):
  cfg = make_config(folder, packing="best_fit", long_documents="error", shuffle=False)
  it = iterator.make_iterator(cfg)
  first_long = next(i for i, doc in enumerate(A) if len(doc) > 32)
  message = (
    rf"source a: document {first_long} of the stream \(.*a-00000-of-\d+\.arrayrecord record "
    rf"\d+\): found {len(A[first_long])} tokens, expected at most data.seq_len 32"
  )
  for prefetch in (0, 2):
    it = iterator.make_iterator(dataclasses.replace(cfg, prefetch=prefetch))
    with pytest.raises(ValueError, match=message):
      take(it, 100)


def test_sources_of_different_tokenizers_are_refused(folder, tmp_path):
  write_source(tmp_path, "z", A, _OtherTok())
  cfg = make_config(folder, weights=(("a", 1.0), ("b", 1.0)))
  sources = (cfg.sources[0], config.SourceConfig(name="b", path=str(tmp_path / "z")))
  with pytest.raises(ValueError, match="data.sources: found tokenizer hashes"):
    iterator.make_iterator(dataclasses.replace(cfg, sources=sources))


def test_missing_pieces_are_named(folder, tmp_path):
  with pytest.raises(shards.ShardError, match="source a: .* no such file or folder"):
    iterator.make_iterator(make_config(tmp_path))
  with pytest.raises(ValueError, match="data.phases: found none"):
    iterator.make_iterator(config.DataConfig())
  write_source(tmp_path, "a", A[:1])
  with pytest.raises(shards.ShardError, match="source a: found 1 documents, expected at least one"):
    iterator.make_iterator(make_config(tmp_path), process_index=1, process_count=2)


def test_a_closed_iterator_says_so(folder):
  it = iterator.make_iterator(make_config(folder, prefetch=2))
  next(it)
  it.close()
  with pytest.raises(ValueError, match="closed"):
    next(it)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_eval_reads_the_whole_source_once_in_order(folder, packing):
  cfg = make_config(folder, packing=packing, num_packing_bins=2)
  batches = list(iterator.make_eval_iterator(cfg, "a"))
  everything = [t for doc in A for t in doc]
  assert sorted(tokens_of(batches)) == everything
  if packing == "concat":
    assert tokens_of(batches) == everything
  assert {b["tokens"].shape for b in batches} == {(4, 32)}
  again = list(iterator.make_eval_iterator(cfg, "a", 3))
  assert equal(again, batches[:3])


def test_eval_gives_every_host_equally_many_batches(folder):
  cfg = make_config(folder, batch_size=2)
  seen = []
  for host in range(2):
    batches = list(iterator.make_eval_iterator(cfg, "a", 50, process_index=host, process_count=2))
    assert len(batches) == 50
    assert batches[-1]["loss_mask"].sum() == 0
    seen.append(tokens_of(batches))
  assert sorted(seen[0] + seen[1]) == [t for doc in A for t in doc]
  with pytest.raises(ValueError, match="num_batches: found None on 2 hosts"):
    iterator.make_eval_iterator(cfg, "a", process_count=2)
  with pytest.raises(ValueError, match="source_name: found 'q', expected one of"):
    iterator.make_eval_iterator(cfg, "q", 1)


@pytest.mark.slow  # an interpreter and a worker process each
@pytest.mark.parametrize("is_closed", [True, False])
def test_worker_processes_end_with_the_iterator_or_the_interpreter(tmp_path, folder, is_closed):
  """grain complains at exit about worker processes that nobody ended."""
  script = tmp_path / "script.py"
  script.write_text(
    "from minicpm_jax import config\n"
    "from minicpm_jax.data import iterator\n"
    "if __name__ == '__main__':\n"
    f"  source = config.SourceConfig(name='a', path={str(folder / 'a')!r})\n"
    "  phase = config.PhaseConfig(weights=(('a', 1.0),))\n"
    "  cfg = config.DataConfig(sources=(source,), phases=(phase,), seq_len=32, batch_size=4,\n"
    "    num_workers=1)\n"
    "  it = iterator.make_iterator(cfg)\n"
    "  print([next(it)['tokens'].sum() for _ in range(3)][0] > 0)\n"
    f"  {'it.close()' if is_closed else 'pass'}\n"
  )
  env = os.environ | {"PYTHONPATH": os.getcwd()}
  done = subprocess.run(
    [sys.executable, script], capture_output=True, text=True, env=env, timeout=300
  )
  assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


@pytest.mark.slow  # an interpreter and a worker process
def test_worker_processes_outlive_ctrl_c(tmp_path, folder):
  """A terminal sends it to the whole group; the run still needs them until it has saved."""
  script = tmp_path / "script.py"
  script.write_text(
    "import os, signal, time\n"
    "from minicpm_jax import config\n"
    "from minicpm_jax.data import iterator\n"
    "if __name__ == '__main__':\n"
    "  signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    f"  source = config.SourceConfig(name='a', path={str(folder / 'a')!r})\n"
    "  phase = config.PhaseConfig(weights=(('a', 1.0),))\n"
    "  cfg = config.DataConfig(sources=(source,), phases=(phase,), seq_len=32, batch_size=4,\n"
    "    num_workers=1)\n"
    "  it = iterator.make_iterator(cfg)\n"
    "  next(it)\n"
    "  try:\n"
    "    os.killpg(os.getpgrp(), signal.SIGINT)\n"
    "    time.sleep(60)\n"
    "  except KeyboardInterrupt:\n"
    "    time.sleep(2)\n"
    "    print([next(it)['tokens'].shape for _ in range(300)][-1])\n"
  )
  env = os.environ | {"PYTHONPATH": os.getcwd()}
  options = dict(capture_output=True, text=True, env=env, timeout=300, start_new_session=True)
  done = subprocess.run([sys.executable, script], **options)
  assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "(4, 32)", "")


@pytest.mark.parametrize("field", ["version", "step", "rows", "cursors", "config"])
def test_a_damaged_state_is_refused_by_field(folder, field):
  it = iterator.make_iterator(make_config(folder))
  state = it.get_state()
  for damaged in ({k: v for k, v in state.items() if k != field}, state | {field: "junk"}):
    with pytest.raises(iterator.DataStateError, match=f"data state: {field}: found"):
      it.set_state(damaged)


@pytest.mark.parametrize(
  "path, value",
  [
    (("rows", "a"), "x"),
    (("cursors", "a"), None),
    (("cursors", "a", "document"), -1),
    (("cursors", "a", "document"), 2**70),
    (("cursors", "a", "offset"), 1.5),
  ],
)
def test_a_damaged_count_is_refused_by_field(folder, path, value):
  it = iterator.make_iterator(make_config(folder))
  next(it)
  state = json.loads(json.dumps(it.get_state()))
  at = state
  for key in path[:-1]:
    at = at[key]
  at[path[-1]] = value
  with pytest.raises(iterator.DataStateError, match=f"data state: {'.'.join(path)}: found"):
    it.set_state(state)
  del state["cursors"]["a"]
  state["rows"] = {}
  with pytest.raises(iterator.DataStateError, match="data state: cursors.a: found none"):
    it.set_state(state)


@pytest.mark.parametrize("sizes", [{"batch_size_per_host": 0}, {"process_count": 0}])
def test_sizes_below_one_are_refused(folder, sizes):
  with pytest.raises(ValueError, match=f"{next(iter(sizes))}: found 0"):
    iterator.make_iterator(make_config(folder), **sizes)
