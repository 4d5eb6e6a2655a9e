"""What surrounds the work of every command: flags of its own, --help, one line for bad input."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

BAD_INPUT = (ValueError, NotImplementedError, ImportError, OSError, flags.Error)


def parse(
  values: flags.FlagValues, argv: Sequence[str], doc: str | None, needed: Sequence[str] = ()
) -> flags.FlagValues:
  """`values` set from `argv` (its first entry is the command) and nothing else.

  Prints `doc` and the flags and leaves with status 0 on --help. ValueError for a positional
  argument, and for a flag of `needed` that is absent or empty.
  """
  if "--help" in argv or "-h" in argv:
    print(f"{doc or ''}\n{values.get_help()}")
    raise SystemExit(0)
  for name in values:
    values[name].unparse()  # or repeatable flags would add to those of an earlier call
  if rest := values(list(argv))[1:]:
    raise ValueError(f"arguments: found {rest[0]!r}, expected flags only")
  for name in needed:
    if values[name].value in (None, "", []):
      raise ValueError(f"--{name}: found none, expected one (see --help)")
  return values


def definer(values: flags.FlagValues) -> Callable[..., flags.FlagHolder]:
  """define(kind, name, default, help, *more): `flags.DEFINE_kind` into `values`."""

  def define(kind: str, name: str, default: Any, text: str, *more: Any) -> flags.FlagHolder:
    return getattr(flags, f"DEFINE_{kind}")(name, default, *more, text, flag_values=values)

  return define


def integers(values: flags.FlagValues, name: str, least: int = 1) -> list[int]:
  """The numbers of a list flag; ValueError names the flag where one is missing or too small."""
  texts = values[name].value
  try:
    found = [int(text) for text in texts]
  except ValueError:
    found = []
  if not found or min(found) < least:
    raise ValueError(f"--{name}: found {','.join(texts)!r}, expected integers >= {least}")
  return found


def refuse_unread(values: flags.FlagValues, names: Sequence[str], found_with: str) -> None:
  """ValueError for the first flag of `names` that was given; `found_with` says who ignores it."""
  for name in names:
    if values[name].present:
      raise ValueError(f"--{name}: found with {found_with}, which does not read it")


def run(
  work: Callable[[], int | None],
  values: flags.FlagValues,
  argv: Sequence[str] | None = None,
  needed: Sequence[str] = (),
) -> int:
  """Exit status of `work()` after `values` are set: its own, 0 for None, 1 for bad input."""
  module = sys.modules[work.__module__]

  def parsed() -> int | None:
    parse(values, sys.argv if argv is None else argv, module.__doc__, needed)
    return work()

  return guard(module.__file__, parsed)


def guard(
  file: str | None,
  work: Callable[[], int | None],
  bad_input: tuple[type[BaseException], ...] = BAD_INPUT,
) -> int:
  """Exit status of `work()`, with `bad_input` told in one line that begins with the command, and
  so for a device's memory that does not suffice, and Ctrl-C.
  """
  name = pathlib.Path(file or "command").stem
  try:
    return work() or 0
  except bad_input as error:
    print(f"{name}: {error}", file=sys.stderr)
    return 1
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    print(
      f"{name}: {str(error).splitlines()[0]} (smaller batches take less: data.batch_size, or "
      "grad_accum with the same batch; so does model.remat=full, and a mesh of more devices)",
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt as error:
    with contextlib.suppress(BrokenPipeError):  # of a reader that Ctrl-C has ended too
      print(f"{name}: {str(error) or 'interrupted'}", file=sys.stderr, flush=True)
    return 130
