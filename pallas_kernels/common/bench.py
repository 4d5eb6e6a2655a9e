"""Timing of kernels against the roofline of the device; one printed row and one JSON row a case."""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import jax

# Dense 16-bit FLOP/s and bytes/s of memory, vendors' data sheets; the first prefix that fits.
PEAKS = {
  "NVIDIA H200": (989e12, 4.8e12),
  "NVIDIA H100 PCIe": (756e12, 2.0e12),
  "NVIDIA H100": (989e12, 3.35e12),
  "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
  "NVIDIA A100": (312e12, 1.56e12),
  "NVIDIA L40S": (362e12, 0.864e12),
  "TPU v5 lite": (197e12, 0.819e12),
  "TPU v6 lite": (918e12, 1.64e12),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """`flops` and `bytes` are what the algorithm must do (causal work counted once, as done)."""

  op: str
  case: str
  implementation: str
  seconds: float
  flops: float
  bytes: float
  dense_seconds: float | None = None
  peak_factor: float = 1.0  # peak FLOP/s of the products' type over that of 16 bits

  def printed(self) -> str:
    flops, bandwidth = peaks()
    rate = (
      f"{self.flops / self.seconds / 1e12:8.2f} TFLOP/s {self.bytes / self.seconds / 1e9:8.1f} GB/s"
    )
    roof = "roofline n/a"
    if flops:
      floor = max(self.flops / (flops * self.peak_factor), self.bytes / bandwidth)
      roof = f"{100 * floor / self.seconds:5.1f} % of roofline"
    dense = "dense n/a"
    if self.dense_seconds is not None:
      dense = f"{self.dense_seconds / self.seconds:6.2f} x dense"
    name = f"{self.op} {self.case} {self.implementation}"
    return f"{name:58s} {1e6 * self.seconds:12.0f} us {rate}  {roof}  {dense}"


def peaks() -> tuple[float | None, float | None]:
  kind = jax.devices()[0].device_kind
  return next((v for name, v in PEAKS.items() if kind.startswith(name)), (None, None))


def seconds(function, *args, repeats: int = 10) -> float:
  """Of one jitted call. On a GPU the time of its kernels, by the profiler, mean of `repeats` calls:
  launching small kernels one by one takes the host longer than they run, and a model's step is
  launched as a whole. Kernels that ran side by side count each in full. Elsewhere the median wall
  time, arrays ready to arrays ready."""
  run = jax.jit(function)
  jax.block_until_ready(run(*args))
  if jax.default_backend() == "gpu":
    return _kernel_seconds(run, args, repeats)
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def _kernel_seconds(run, args, repeats: int) -> float:
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repeats):
        out = run(*args)
      jax.block_until_ready(out)
    (path,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
  lines = [line for plane in planes if "GPU" in plane.name for line in plane.lines]
  events = [event for line in lines if "Stream" in line.name for event in line.events]
  if not events:
    raise RuntimeError("the profiler saw no kernel (is CUPTI installed and allowed to trace?)")
  return sum(event.duration_ns for event in events) / 1e9 / repeats


def dense_attention(q_BTNH, k_BSKH, v_BSKH, *, is_causal=True):
  """`jax.nn.dot_product_attention` with cuDNN, the yardstick on NVIDIA."""
  return jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, is_causal=is_causal, implementation="cudnn"
  )


def dense_seconds(function, *args, repeats: int) -> float | None:
  """None where there is no cuDNN or it does not serve the shape."""
  if jax.default_backend() != "gpu":
    return None
  try:
    return seconds(function, *args, repeats=repeats)
  except Exception as error:
    print(f"  dense: {type(error).__name__}: {str(error).splitlines()[0][:90]}", file=sys.stderr)
    return None


def arguments(op: str, cases, argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line that every bench has. Without an accelerator only `xla` is timed."""
  parser = argparse.ArgumentParser(prog=f"python -m pallas_kernels.{op}.bench")
  parser.add_argument("--implementation", default="auto")
  parser.add_argument("--cases", default=",".join(cases), help="names, separated by commas")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--json", default=None, help="file to write the rows to")
  parser.add_argument("--tune", action="store_true", help="search tiles and write tuned.json")
  args = parser.parse_args(argv)
  args.cases = args.cases.split(",")
  unknown = sorted(set(args.cases) - set(cases))
  if unknown:
    parser.error(f"--cases: found {unknown}, expected some of {sorted(cases)}")
  if jax.default_backend() == "cpu" and args.implementation != "xla":
    parser.error(
      f"no accelerator: found {jax.devices()[0].device_kind!r}; the kernels need a GPU or a TPU, "
      "pass --implementation=xla to time the CPU path"
    )
  return args


def report(rows: list[Row], path: str | None) -> None:
  """Writes the rows as JSON, with the device and the versions."""
  if path is None:
    return
  device = jax.devices()[0].device_kind
  document = dict(device=device, jax=jax.__version__, rows=[dataclasses.asdict(r) for r in rows])
  temporary = f"{path}.tmp"
  with open(temporary, "w") as file:
    json.dump(document, file, indent=1, allow_nan=False)
  os.replace(temporary, path)
