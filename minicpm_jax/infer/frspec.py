"""FR-Spec: a draft head with the most frequent tokens only (inference.md section 11, FR-Spec).

An index is a list of r full token ids in falling frequency. Files: `freq_{r}.npy`, and CPM.cu's
`freq_{r}.pt`, a list of ints saved by torch; it is read by an unpickler that knows no classes, and
written without torch.
"""

import io
import math
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int, Num

from minicpm_jax.core import files
from minicpm_jax.quant import qtensor

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # first object of torch's files before they were archives
_MAX_BYTES = 1 << 26  # of a .pt file; 64k ids take 200 kB


class FrIndexError(ValueError):
  """An index or a request for one that cannot be."""


Ids = Sequence[int] | Int[np.ndarray, "r"]
Head = Num[Array | np.ndarray, "D _"] | qtensor.QTensor


def count_tokens(token_lists: Iterable[Sequence[int]], vocab_size: int) -> Int[np.ndarray, " V"]:
  """Occurrences of every id."""
  counts_V = np.zeros(vocab_size, np.int64)
  for tokens in token_lists:
    ids = np.asarray(tokens)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
      raise FrIndexError(f"tokens: found {ids.dtype}, expected token ids")
    ids = ids.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
      bad = int(ids.min() if ids.min() < 0 else ids.max())
      raise FrIndexError(f"tokens: found id {bad}, expected 0..{vocab_size - 1}")
    counts_V += np.bincount(ids, minlength=vocab_size)
  return counts_V


def mix(
  counts: Sequence[Num[np.ndarray, " V"]], weights: Sequence[float | int]
) -> Float[np.ndarray, " V"]:
  """Frequencies of a mixture: domain d gives share weights[d] / sum, whatever its size."""
  if len(counts) != len(weights):
    raise FrIndexError(f"weights: found {len(weights)}, expected one for each of {len(counts)}")
  if any(w < 0 for w in weights) or not 0 < sum(weights) < math.inf:
    raise FrIndexError(f"weights: found {list(weights)}, expected numbers >= 0 with a sum > 0")
  total = np.zeros(counts[0].shape, np.float64)
  for i, (counts_V, weight) in enumerate(zip(counts, weights, strict=True)):
    if counts_V.shape != total.shape:
      raise FrIndexError(
        f"counts[{i}]: found shape {list(counts_V.shape)}, expected {list(total.shape)}"
      )
    if not counts_V.sum() > 0:
      raise FrIndexError(f"counts[{i}]: found no token, expected text in every domain")
    total += weight / sum(weights) * (counts_V / counts_V.sum())
  return total


def build_index(
  counts_V: Num[np.ndarray, " V"], size: int, forced_ids: Iterable[int] = ()
) -> Int[np.ndarray, " r"]:
  """Exactly `size` ids: the most frequent, ties by lower id; forced ids replace the rarest kept.

  Forced ids that are frequent keep their rank; the others come last, by falling count.
  """
  if counts_V.ndim != 1 or not (counts_V >= 0).all():
    raise FrIndexError(
      f"counts: found {counts_V.dtype} of shape {list(counts_V.shape)} with a least number of "
      f"{counts_V.min(initial=0)}, expected one number >= 0 for each id"
    )
  vocab_size = counts_V.shape[0]
  forced = sorted(set(map(int, forced_ids)))
  if forced and (forced[0] < 0 or forced[-1] >= vocab_size):
    bad = forced[0] if forced[0] < 0 else forced[-1]
    raise FrIndexError(f"forced_ids: found {bad}, expected 0..{vocab_size - 1}")
  if not max(len(forced), 1) <= size <= vocab_size:
    raise FrIndexError(
      f"size: found {size}, expected {max(len(forced), 1)}..{vocab_size} "
      f"({len(forced)} forced ids, vocabulary {vocab_size})"
    )
  order = np.lexsort((np.arange(vocab_size), -counts_V))
  is_forced = np.isin(order, forced)
  is_late = is_forced & (np.arange(vocab_size) >= size)
  kept = order[:size]
  num_late = int(is_late.sum())
  if num_late:
    dropped = np.flatnonzero(~is_forced[:size])[-num_late:]
    kept = np.concatenate((np.delete(kept, dropped), order[is_late]))
  return kept.astype(np.int32)


def forced_ids(tok: Any) -> tuple[int, ...]:
  """Stop ids, and the special tokens that the chat template writes."""
  ids = set(tok.stop_ids)
  if tok.eos_id is not None:
    ids.add(tok.eos_id)
  template = tok.chat_template or ""
  ids |= {token_id for text, token_id in tok.special_tokens.items() if text in template}
  return tuple(sorted(ids))


def coverage(counts_V: Num[np.ndarray, " V"], ids: Ids) -> float:
  """Share of all occurrences that the index keeps."""
  total = float(counts_V.sum())
  if not total > 0:
    raise FrIndexError("counts: found no token, expected some text")
  check_index(np.asarray(ids), counts_V.shape[0])
  return float(counts_V[np.asarray(ids)].sum()) / total


def check_index(ids: Num[np.ndarray, " r"], vocab_size: int, what: str = "fr index") -> None:
  """Refuses an index with ids outside the vocabulary or twice."""
  if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
    raise FrIndexError(
      f"{what}: found {ids.dtype} of shape {list(ids.shape)}, expected a list of token ids"
    )
  if ids.min() < 0 or ids.max() >= vocab_size:
    bad = int(ids.min() if ids.min() < 0 else ids.max())
    raise FrIndexError(f"{what}: found id {bad}, expected 0..{vocab_size - 1}")
  if np.unique(ids).size != ids.size:
    raise FrIndexError(f"{what}: found {np.unique(ids).size} distinct ids in {ids.size}")


def fr_head(head_DV: Head, ids: Ids) -> Head:
  """The columns [D, r] of the target's head [D, V] that the draft scores, gathered once."""
  check_index(np.asarray(ids), head_DV.shape[1])
  if qtensor.is_qtensor(head_DV):
    return qtensor.outputs(head_DV, np.asarray(ids))
  return head_DV[:, np.asarray(ids)]


# --- Files ---------------------------------------------------------------------------------------


def save_index(folder: str | os.PathLike, ids: Ids) -> list[pathlib.Path]:
  """Writes `freq_{r}.npy` and `freq_{r}.pt`; returns both paths."""
  check_index(np.asarray(ids), 2**31)
  ids = np.asarray(ids, np.int32)
  stem = f"freq_{ids.size}"
  npy = io.BytesIO()
  np.save(npy, ids)
  written = []
  for suffix, data in (("npy", npy.getvalue()), ("pt", _torch_archive(stem, ids.tolist()))):
    written.append(pathlib.Path(folder) / f"{stem}.{suffix}")
    files.write(written[-1], data)
  return written


def load_index(path: str | os.PathLike, size: int | None = None) -> Int[np.ndarray, " r"]:
  """int32 ids of a .npy or .pt file, or of the folder's `freq_{size}` (its only one if None)."""
  path = pathlib.Path(path)
  if path.is_dir():
    path = _in_folder(path, size)
  if not path.is_file():
    raise FrIndexError(f"{path}: found no such file, expected freq_SIZE.npy or .pt")
  if path.stat().st_size > _MAX_BYTES:
    raise FrIndexError(f"{path}: found {path.stat().st_size} bytes, expected an index file")
  if path.suffix == ".npy":
    try:
      ids = np.load(path, allow_pickle=False)
    except Exception as error:  # its header is Python, which fails in many ways
      raise FrIndexError(f"{path}: not a numpy file ({error})") from error
  else:
    ids = _ids_of(path)
  check_index(ids, 2**31, str(path))
  if size is not None and ids.size != size:
    raise FrIndexError(f"{path}: found {ids.size} ids, expected {size}")
  return ids.astype(np.int32)


def _in_folder(folder: pathlib.Path, size: int | None) -> pathlib.Path:
  found = {}
  for path in sorted(folder.glob("freq_*")):
    if match := re.fullmatch(r"freq_(\d+)\.(pt|npy)", path.name):
      found[int(match[1])] = min(path, found.get(int(match[1]), path), key=lambda p: p.suffix)
  if size is None and len(found) == 1:
    return next(iter(found.values()))
  if size not in found:
    wanted = "exactly one" if size is None else f"freq_{size}"
    raise FrIndexError(f"{folder}: found indices of sizes {sorted(found)}, expected {wanted}")
  return found[size]


class _NoClasses(pickle.Unpickler):
  """Lists, dicts and numbers only: nothing that a file names is ever imported."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"found {module}.{name}, expected a plain list of ints")

  def persistent_load(self, pid: Any) -> Any:
    raise pickle.UnpicklingError("found a stored tensor, expected a plain list of ints")


def _ids_of(path: pathlib.Path) -> Int[np.ndarray, " r"]:
  try:
    value = _unpickled(path)
  except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, TypeError) as error:
    raise FrIndexError(f"{path}: {error}") from error
  except Exception as error:  # zip and pickle raise nearly every kind
    raise FrIndexError(f"{path}: a damaged archive or pickle ({error!r})") from error
  is_ids = isinstance(value, list) and all(type(x) is int and 0 <= x < 2**31 for x in value)
  if not is_ids:
    raise FrIndexError(f"{path}: found a {type(value).__name__}, expected a list of token ids")
  return np.asarray(value, np.int64)


def _unpickled(path: pathlib.Path) -> Any:
  data = path.read_bytes()
  if zipfile.is_zipfile(io.BytesIO(data)):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      names = [n for n in archive.namelist() if n.endswith("data.pkl")]
      if len(names) != 1:
        raise ValueError(f"found {len(names)} entries data.pkl in the archive, expected one")
      if archive.getinfo(names[0]).file_size > _MAX_BYTES:
        raise ValueError("found a data.pkl that is too large for an index")
      return _NoClasses(io.BytesIO(archive.read(names[0]))).load()
  stream = io.BytesIO(data)
  value = _NoClasses(stream).load()
  if value == _TORCH_MAGIC:
    for _ in ("protocol", "system"):
      _NoClasses(stream).load()
    value = _NoClasses(stream).load()
  return value


def _torch_archive(stem: str, ids: list[int]) -> bytes:
  """What torch.save(ids) writes: an uncompressed archive of a pickle and two notes."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
    entries = {"data.pkl": pickle.dumps(ids, protocol=2), "byteorder": b"little", "version": b"3\n"}
    for name, data in entries.items():
      archive.writestr(zipfile.ZipInfo(f"{stem}/{name}", (1980, 1, 1, 0, 0, 0)), data)
  return out.getvalue()
