"""Executor: the same result for any number of workers, and whatever is killed on the way."""

import json
import os
import pathlib
import tempfile

import hypothesis
import hypothesis.strategies as st
import pytest

from minicpm_jax.data import documents, executor
from tests.data import stages_for_tests as stages

pytest.importorskip("pyarrow")

NUM_FILES, NUM_ROWS = 3, 7


@pytest.fixture
def corpus(tmp_path):
  return _corpus(tmp_path / "in")


def _corpus(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  for f in range(NUM_FILES):
    rows = [{"id": f"f{f}d{i}", "text": "x" * i, "url": f"u{i}"} for i in range(NUM_ROWS)]
    (folder / f"part{f}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return folder


def _expected():
  """(kept ids, dropped ids) worked out by hand: DropShort keeps texts of 3 characters and more."""
  ids = [(f"f{f}d{i}", i) for f in range(NUM_FILES) for i in range(NUM_ROWS)]
  return [name for name, i in ids if i >= 3], [name for name, i in ids if i < 3]


def _check(folder, report=None):
  kept = [doc.id for doc in executor.read_kept(folder)]
  drops = [row["id"] for row in executor.read_drops(folder)]
  assert (kept, drops) == _expected()
  assert not list(pathlib.Path(folder).glob(".tmp-*"))
  counts = report.counts if report else json.loads((folder / "report.json").read_text())
  assert (counts["read"], counts["kept"]) == (NUM_FILES * NUM_ROWS, len(kept))
  assert counts["dropped"] == {"DropShort/short": len(drops)}


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_same_result_for_any_number_of_workers(corpus, tmp_path, num_workers):
  out, seen = tmp_path / "out", []
  report = executor.run(
    [corpus], [stages.DropShort()], out, num_workers=num_workers, on_shard=seen.append
  )
  _check(out, report)
  assert sorted(c["kept"] for c in seen) == [4, 4, 4]
  by_hand = NUM_FILES * sum(range(NUM_ROWS)), NUM_FILES * (3 + 4 + 5 + 6)
  stage = report.counts["stages"][1]
  assert (stage["chars_in"], stage["chars_out"]) == by_hand
  doc = next(executor.read_kept(out))
  assert (doc.text, doc.source, doc.meta) == ("xxx", str(corpus / "part0.jsonl"), {"url": "u3"})


@pytest.mark.smoke
def test_rerun_makes_only_what_is_missing_or_changed(corpus, tmp_path):
  out, made = tmp_path / "out", []

  def run(stage):
    made.clear()
    on_shard = lambda counts: made.append(pathlib.Path(counts["input"]).name)  # noqa: E731
    return executor.run([corpus], [stage], out, num_workers=0, on_shard=on_shard)

  run(stages.DropShort())
  assert run(stages.DropShort()).num_resumed == 3 and made == []
  next(out.glob("part1*.done")).unlink()
  assert run(stages.DropShort()).num_resumed == 2 and made == ["part1.jsonl"]
  (corpus / "part2.jsonl").write_text('{"id": "new", "text": "long enough"}\n')
  run(stages.DropShort())
  assert made == ["part2.jsonl"]
  assert "new" in [doc.id for doc in executor.read_kept(out)]
  run(stages.DropShort(min_chars=5))
  assert len(made) == 3


def test_killed_workers_lose_and_double_nothing(corpus, tmp_path):
  (tmp_path / "marks").mkdir()
  kill = stages.KillWorker(str(tmp_path / "marks"), ("f0d6", "f1d0", "f2d3"))
  report = executor.run(
    [corpus], [kill, stages.DropShort()], tmp_path / "out", num_workers=2, max_attempts=2
  )
  assert len(list((tmp_path / "marks").iterdir())) == 3  # every kill happened
  _check(tmp_path / "out", report)


def test_a_shard_that_always_kills_is_reported_and_the_others_finish(corpus, tmp_path):
  (tmp_path / "marks").mkdir()
  kill = stages.KillWorker(str(tmp_path / "marks"), ("f1d2",), times=2)
  call = dict(inputs=[corpus], stages=[kill, stages.DropShort()], out_folder=tmp_path / "out")
  with pytest.raises(executor.ExecutorError, match=r"1 of 3.*part1.*died 2 times.*-9"):
    executor.run(**call, num_workers=1, max_attempts=2)
  assert len(list((tmp_path / "out").glob("*.done"))) == 2
  assert executor.run(**call, num_workers=1).num_resumed == 2
  _check(tmp_path / "out")


class _Killed(BaseException):
  """Stands for SIGKILL: nothing that the code does on the way out has an effect."""


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(kills=st.lists(st.integers(0, 11), min_size=1, max_size=3), late=st.booleans())
def test_random_kills_between_any_two_file_operations(kills, late):
  """Killed before or after the n-th rename of a run, some runs in a row; then a rerun."""
  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    folder = pathlib.Path(folder)
    corpus, replace, unlink = _corpus(folder / "in"), os.replace, pathlib.Path.unlink
    left = [0]

    def dying_replace(*args):
      left[0] -= 1
      if left[0] < 0 and not late:
        raise _Killed
      replace(*args)
      if left[0] < 0:
        raise _Killed

    dead = lambda self, missing_ok=False: left[0] < 0 or unlink(self, missing_ok)  # noqa: E731
    patch.setattr(os, "replace", dying_replace)
    patch.setattr(pathlib.Path, "unlink", dead)
    for kill in kills:
      left[0] = kill
      try:
        executor.run([corpus], [stages.DropShort()], folder / "out", num_workers=0)
      except _Killed:
        pass
    left[0] = 10**6
    report = executor.run([corpus], [stages.DropShort()], folder / "out", num_workers=0)
    _check(folder / "out", report)


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
  st.sets(st.tuples(st.integers(0, NUM_FILES - 1), st.integers(0, NUM_ROWS - 1)), max_size=5),
  st.integers(1, 3),
)
def test_random_real_kills(kills, num_workers):
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "marks").mkdir()
    kill = stages.KillWorker(str(folder / "marks"), tuple(f"f{f}d{i}" for f, i in sorted(kills)))
    how = [kill, stages.DropShort()]
    corpus = _corpus(folder / "in")
    executor.run([corpus], how, folder / "out", num_workers=num_workers, max_attempts=9)
    _check(folder / "out")


def test_full_disk_stops_the_run_and_a_rerun_completes_it(corpus, tmp_path, monkeypatch):
  """/dev/full refuses every write with the kernel's own ENOSPC."""
  out = tmp_path / "out"
  out.mkdir()
  second = executor.shard_name(corpus / "part1.jsonl")
  (out / f".tmp-{os.getpid()}-{second}.parquet").symlink_to("/dev/full")
  glob = pathlib.Path.glob  # the link must outlive the clean-up of stale files
  monkeypatch.setattr(pathlib.Path, "glob", lambda p, s: () if s == ".tmp-*" else glob(p, s))
  with pytest.raises(executor.ExecutorError, match=r"(?s)1 of 3.*part1.*No space left"):
    executor.run([corpus], [stages.DropShort()], out, num_workers=0)
  assert len(list(out.glob("*.done"))) == 1  # part2 was not begun
  assert not list(out.glob(f"{second}*"))
  monkeypatch.undo()
  _check(out, executor.run([corpus], [stages.DropShort()], out, num_workers=0))


@pytest.mark.parametrize(
  "stage, message",
  [
    (stages.Lose("f1d4", 0), r"part1.*Lose: lost 1 documents, first 'f1d4'"),
    (stages.Lose("f1d4", 2), r"part1.*Lose: yielded 'f1d4' twice"),
    (stages.Raise("f1d4"), r"part1.*cannot digest f1d4"),
  ],
)
def test_faulty_stages_are_refused(corpus, tmp_path, stage, message):
  with pytest.raises(executor.ExecutorError, match=f"(?s){message}"):
    executor.run([corpus], [stage], tmp_path / "out", num_workers=0)
  assert len(list((tmp_path / "out").glob("*.done"))) == 2  # the other shards are complete
  assert not list((tmp_path / "out").glob("part1*"))


def test_folder_of_other_inputs_and_second_run_are_refused(corpus, tmp_path):
  executor.run([corpus], [], tmp_path / "out", num_workers=0)
  with pytest.raises(executor.ExecutorError, match=r"part1.*part2.*a folder of its own"):
    executor.run([corpus / "part0.jsonl"], [], tmp_path / "out", num_workers=0)
  seen = []

  def again(counts):
    with pytest.raises(executor.ExecutorError, match="another run is writing"):
      executor.run([corpus], [], tmp_path / "other", num_workers=0)
    seen.append(counts)

  executor.run([corpus], [], tmp_path / "other", num_workers=0, on_shard=again)
  assert len(seen) == 3


def test_two_passes_keep_every_field(corpus, tmp_path):
  first = executor.run([corpus], [], tmp_path / "one", num_workers=0)
  executor.run(first.parquet, [], tmp_path / "two", num_workers=0)
  assert list(executor.read_kept(tmp_path / "two")) == list(executor.read_kept(tmp_path / "one"))


def test_ids_over_files_are_counted_and_one_file_is_read_once(tmp_path):
  for name in ("a", "b"):
    (tmp_path / f"{name}.jsonl").write_text('{"id": "same", "text": "t"}\n')
  (tmp_path / "c.jsonl").write_text("")
  files = [tmp_path / f"{n}.jsonl" for n in "abc"]
  report = executor.run([*files, files[0]], [], tmp_path / "out", num_workers=0)
  assert (report.counts["kept"], report.counts["repeated_ids"]) == (2, 1)
  assert report.counts["empty_inputs"] == [str(files[2])]
  kept = list(executor.read_kept(tmp_path / "out"))
  assert [d.id for d in kept] == ["same", "same"] and all(
    isinstance(d, documents.Doc) for d in kept
  )


def test_ids_are_those_of_reading_the_folder_directly(tmp_path):
  """Rows without ids: the executor and `documents.read` split them alike, wherever they lie."""
  made = []
  for where in ("a", "b/c"):
    root = tmp_path / where
    (root / "sub").mkdir(parents=True)
    for folder in (root, root / "sub"):
      (folder / "x.jsonl").write_text(json.dumps({"text": "x" * 9}) + "\n")
    out = tmp_path / f"out{len(made)}"
    executor.run([root], [stages.DropShort()], out, num_workers=0)
    made.append(sorted(doc.id for doc in executor.read_kept(out)))
    assert made[-1] == sorted(doc.id for doc in documents.read([root]))
  assert made[0] == made[1] and len(set(made[0])) == 2


def test_sizes_and_folders_without_a_run_are_refused(tmp_path):
  with pytest.raises(ValueError, match="num_workers: found -1"):
    executor.run([tmp_path], [], tmp_path / "out", num_workers=-1)
  assert not (tmp_path / "out").exists()
  for read in (executor.read_kept, executor.read_drops):
    with pytest.raises(FileNotFoundError, match="expected the folder of a finished run"):
      list(read(tmp_path))
