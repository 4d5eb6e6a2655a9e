"""FR-Spec lists: counts, order, exact sizes, forced ids, files (inference.md 22.10)."""

import inspect
import io
import pickle
import zipfile

import numpy as np
import pytest

from experiments import build_fr_index
from minicpm_jax.infer import frspec
from minicpm_jax.text import tokenizer as tokenizer_lib

TEXT = [[5, 1, 5, 2], [2, 5, 7], [], [1]]  # 5: 3, 1: 2, 2: 2, 7: 1


def test_counts_of_a_fixed_text():
  counts = frspec.count_tokens(TEXT, 9)
  assert counts.tolist() == [0, 2, 2, 0, 0, 3, 0, 1, 0]
  assert frspec.coverage(counts, np.array([5, 1])) == 5 / 8
  with pytest.raises(frspec.FrIndexError, match="found id 7, expected 0..6"):
    frspec.count_tokens(TEXT, 7)


def test_order_ties_and_forced_ids_give_exactly_r():
  counts = frspec.count_tokens(TEXT, 9)
  build = frspec.build_index
  assert build(counts, 9).tolist() == [5, 1, 2, 7, 0, 3, 4, 6, 8]  # ties: lower id
  assert build(counts, 3).tolist() == [5, 1, 2]
  assert build(counts, 3, [1]).tolist() == [5, 1, 2]  # present already: nothing changes
  assert build(counts, 3, [8, 7]).tolist() == [5, 7, 8]  # the rarest two make room
  assert build(counts, 3, [2, 8]).tolist() == [5, 2, 8]  # but not a forced one
  assert build(counts, 2, [7, 8]).tolist() == [7, 8]
  for size in range(2, 10):
    ids = build(counts, size, [0, 8])
    assert ids.size == size == np.unique(ids).size and {0, 8} <= set(ids.tolist())
  for size, match in ((1, "expected 2..9"), (10, "size: found 10")):
    with pytest.raises(frspec.FrIndexError, match=match):
      build(counts, size, [7, 8])
  with pytest.raises(frspec.FrIndexError, match="forced_ids: found 9"):
    build(counts, 3, [9])


def test_domains_are_mixed_by_share_not_by_size():
  small, large = np.array([4, 0, 0]), np.array([0, 600, 400])
  np.testing.assert_allclose(frspec.mix([small, large], [3, 1]), [0.75, 0.15, 0.10])
  with pytest.raises(frspec.FrIndexError, match="weights: found 1, expected one for each of 2"):
    frspec.mix([small, large], [1])
  with pytest.raises(frspec.FrIndexError, match="counts.1.: found no token"):
    frspec.mix([small, 0 * large], [1, 1])
  for weights in ([0, 0], [1, float("inf")]):
    with pytest.raises(frspec.FrIndexError, match="weights"):
      frspec.mix([small, large], weights)


def test_files_round_trip_and_sizes_are_checked(tmp_path):
  ids = np.array([7, 0, 3], np.int32)
  paths = frspec.save_index(tmp_path, ids)
  assert [p.name for p in paths] == ["freq_3.npy", "freq_3.pt"]
  for path in (*paths, tmp_path):
    assert frspec.load_index(path).tolist() == [7, 0, 3]
  frspec.save_index(tmp_path, np.arange(5))
  assert frspec.load_index(tmp_path, 5).tolist() == [0, 1, 2, 3, 4]
  with pytest.raises(frspec.FrIndexError, match=r"sizes \[3, 5\], expected exactly one"):
    frspec.load_index(tmp_path)
  with pytest.raises(frspec.FrIndexError, match="found 3 ids, expected 4"):
    frspec.load_index(paths[1], 4)
  with pytest.raises(frspec.FrIndexError, match="no such file"):
    frspec.load_index(tmp_path / "x.pt")


@pytest.mark.oracle
def test_torch_reads_ours_and_we_read_torchs(tmp_path):
  torch = pytest.importorskip("torch")
  path = frspec.save_index(tmp_path, np.array([9, 4, 6]))[1]
  assert torch.load(path, weights_only=True) == [9, 4, 6]
  for is_zip in (True, False):
    torch.save([3, 2, 100000], tmp_path / "t.pt", _use_new_zipfile_serialization=is_zip)
    assert frspec.load_index(tmp_path / "t.pt").tolist() == [3, 2, 100000]


class Evil:
  def __reduce__(self):
    return (open, ("/tmp/never", "w"))


@pytest.mark.parametrize(
  "value, match",
  [
    (Evil(), "found (io|_io).open, expected a plain list of ints"),
    ({"a": 1}, "found a dict, expected a list of token ids"),
    ([1, True], "expected a list of token ids"),
    ([1, -2], "expected a list of token ids"),
    ([1.0], "expected a list of token ids"),
    ([], "expected a list of token ids"),
    ([3, 3], "freq_1.pt: found 1 distinct ids in 2"),
    (np.arange(3), "expected a plain list of ints"),
  ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_run_nothing(tmp_path, value, match, is_zip):
  path = tmp_path / "freq_1.pt"
  data = pickle.dumps(value, protocol=2)
  if is_zip:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
      archive.writestr("freq_1/data.pkl", data)
    data = buffer.getvalue()
  path.write_bytes(data)
  with pytest.raises(frspec.FrIndexError, match=match):
    frspec.load_index(path)


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04", pickle.dumps([1, 2])[:-1]])
def test_damaged_files_are_named(tmp_path, data):
  path = tmp_path / "freq_2.pt"
  path.write_bytes(data)
  with pytest.raises(frspec.FrIndexError, match="freq_2.pt: "):
    frspec.load_index(path)


@pytest.mark.parametrize("offset, byte", [(10, 0), (12, 0x7B), (30, 0x28), (60, 0x5B), (6, 9)])
def test_damaged_headers_of_arrays_are_named(tmp_path, offset, byte):
  """numpy reads the header as Python: a broken one is a SyntaxError or a TokenError."""
  path = [p for p in frspec.save_index(tmp_path, [3, 1]) if p.suffix == ".npy"][0]
  data = bytearray(path.read_bytes())
  data[offset] = byte
  path.write_bytes(data)
  with pytest.raises(frspec.FrIndexError, match="freq_2.npy: not a numpy file"):
    frspec.load_index(path)


def test_bad_counts_and_indices_are_refused(tmp_path):
  for counts in ([1.0, np.nan, 3.0], [-1.0, 2.0, 3.0]):
    with pytest.raises(frspec.FrIndexError, match="^counts: found float64 of shape"):
      frspec.build_index(np.array(counts), 1)
  with pytest.raises(frspec.FrIndexError, match="^tokens: found float64, expected token ids"):
    # beartype looks at one item drawn by chance
    inspect.unwrap(frspec.count_tokens)([[1, 2], [], [1.5]], 4)
  with pytest.raises(frspec.FrIndexError, match=r"^counts\[1\]: found shape \[2\], expected \[3\]"):
    frspec.mix([np.ones(3), np.ones(2)], [1, 1])
  for ids, match in (([3], "found id 3, expected 0..2"), ([1, 1], "1 distinct ids in 2")):
    with pytest.raises(frspec.FrIndexError, match=match):
      frspec.coverage(np.ones(3), ids)
  for ids in ([1, 1], [-1], np.zeros(0, np.int32)):
    with pytest.raises(frspec.FrIndexError):
      frspec.save_index(tmp_path / "new", ids)
  assert not (tmp_path / "new").exists()


def test_check_index():
  frspec.check_index(np.array([1, 0]), 2)
  for ids, match in (([0, 2], "found id 2"), ([1, 1], "1 distinct ids in 2"), ([], "expected a l")):
    with pytest.raises(frspec.FrIndexError, match=match):
      frspec.check_index(np.array(ids, int), 2)
  head = np.arange(12.0).reshape(3, 4)
  np.testing.assert_array_equal(frspec.fr_head(head, np.array([3, 0])), head[:, [3, 0]])


def test_command_counts_lines_and_forces_markers(tmp_path, capsys):
  lines = ["to be or not to be", "that is the question", "to sleep"]
  tok = tokenizer_lib.train_bpe([x + "\n" for x in lines] * 20, vocab_size=300)
  tok.save(tmp_path / "tok")
  (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
  (tmp_path / "b.txt").write_text("zebra " * 500)
  args = ["x", f"--tokenizer={tmp_path / 'tok'}", f"--output={tmp_path / 'out'}", "--sizes=40,25%"]
  args += [f"--corpus={tmp_path / 'a.txt'}", f"--corpus={tmp_path / 'b.txt'}", "--weights=1,0"]
  assert build_fr_index.main(args) == 0
  ids = frspec.load_index(tmp_path / "out", 40)
  counts = frspec.count_tokens([tok.encode(x) for x in lines], tok.vocab_size)
  forced = frspec.forced_ids(tok)
  assert set(tok.stop_ids) <= set(forced) and forced
  expected = frspec.build_index(counts / counts.sum(), 40, forced)
  np.testing.assert_array_equal(ids, expected)
  quarter = round(0.25 * tok.vocab_size)
  expected = frspec.build_index(counts / counts.sum(), quarter, forced)
  np.testing.assert_array_equal(frspec.load_index(tmp_path / "out", quarter), expected)
  assert "keep" in capsys.readouterr().out
  assert build_fr_index.main(args[:2]) == 1
  assert build_fr_index.main([*args, "--sizes=many"]) == 1
  assert "expected a number of ids" in capsys.readouterr().err
  assert build_fr_index.main([*args, "--sizes="]) == 1
  out, err = capsys.readouterr()
  assert "--sizes: found none" in err and not out  # nothing is counted in vain
  for weights in ("a,b", "1", "0,0", "-1,2", "nan,1"):
    assert build_fr_index.main([*args, f"--weights={weights}"]) == 1
    out, err = capsys.readouterr()
    assert f"--weights: found {weights}, expected 2 numbers >= 0" in err and not out
