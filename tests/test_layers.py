"""The import layers of the house (CONTRIBUTING.md), checked on the AST of every module."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LAYERS = {
  "pallas_kernels": 0,
  "minicpm_jax.config": 1,
  "minicpm_jax.core": 1,
  "minicpm_jax.nn": 2,
  "minicpm_jax.optim": 2,
  "minicpm_jax.quant": 2,
  "minicpm_jax.text": 2,
  "minicpm_jax.data": 2,
  "minicpm_jax.models": 3,
  "minicpm_jax.ckpt": 3,
  "minicpm_jax.train": 4,
  "minicpm_jax.align": 4,
  "minicpm_jax.infer": 4,
  "minicpm_jax.tunnel": 4,
  "minicpm_jax.deploy": 4,
  "configs": 6,
  "experiments": 7,
}
# Imports inside one layer that are allowed, beyond a package importing itself.
SAME_LAYER = {
  ("minicpm_jax.core", "minicpm_jax.config"),
  ("minicpm_jax.nn", "minicpm_jax.quant"),
  ("minicpm_jax.data", "minicpm_jax.text"),
  ("minicpm_jax.ckpt", "minicpm_jax.models"),
  ("minicpm_jax.align", "minicpm_jax.train"),
  ("minicpm_jax.align", "minicpm_jax.infer"),
  ("minicpm_jax.tunnel", "minicpm_jax.train"),
  ("minicpm_jax.deploy", "minicpm_jax.infer"),
}
# Packages outside the base list: only inside functions, with an error that names the extra.
OPTIONAL = {
  "torch",
  "transformers",
  "matplotlib",
  "jax_triton",
  "triton",
  "tokamax",
  "qwix",
  "llguidance",
  "sentencepiece",
  "tokenizers",
  "jinja2",
  "gguf",
  "pyarrow",
  "zstandard",
  "fasttext",
  "trafilatura",
  "huggingface_hub",
  "py3langid",
  "semhash",
  "pyspark",
  "pandas",
  "fastapi",
  "uvicorn",
}
LAZY_ONLY = OPTIONAL | {"rich", "tensorboardX"}


def package_of(module: str) -> str | None:
  for name in sorted(LAYERS, key=len, reverse=True):
    if module == name or module.startswith(name + "."):
      return name
  return None


def source_files():
  for top in ("pallas_kernels", "minicpm_jax", "configs", "experiments"):
    yield from sorted((ROOT / top).rglob("*.py"))


def imports_of(tree: ast.AST):
  """(imported module, is at module level) of every import statement."""
  top_level = set(map(id, ast.iter_child_nodes(tree)))
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, id(node) in top_level
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative import"
      for alias in node.names:
        yield f"{node.module}.{alias.name}", id(node) in top_level


def violations(path: pathlib.Path, text: str) -> list[str]:
  module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
  own = package_of(module)
  found = []
  for name, is_top in imports_of(ast.parse(text)):
    root = name.split(".")[0]
    target = package_of(name)
    if root in LAZY_ONLY and is_top and own != "experiments":
      if not (path.name.endswith("triton_kernels.py") and root == "triton"):
        found.append(f"{module}: {root} must be imported inside a function")
    if own == "minicpm_jax.config" and root in ("jax", "flax", "optax"):
      found.append(f"{module}: config must not import {root}")
    if own == "pallas_kernels":
      if root in ("flax", "optax", "absl", "orbax", "grain"):
        found.append(f"{module}: pallas_kernels must not import {root}")
    if target is None or own is None or target == own:
      continue
    if own == "configs":
      if target != "minicpm_jax.config" and not name.startswith("minicpm_jax.models.zoo"):
        found.append(f"{module}: configs may import config and models.zoo only, not {name}")
      continue
    if LAYERS[target] > LAYERS[own]:
      found.append(f"{module} (L{LAYERS[own]}) imports {name} (L{LAYERS[target]})")
    elif LAYERS[target] == LAYERS[own] and (own, target) not in SAME_LAYER:
      found.append(f"{module} imports {name}: packages of one layer do not import each other")
  return found


@pytest.mark.smoke
def test_imports_go_down_the_layers():
  found = [v for path in source_files() for v in violations(path, path.read_text())]
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  "path, text",
  [
    ("minicpm_jax/nn/x.py", "from minicpm_jax.models import zoo"),
    ("minicpm_jax/nn/x.py", "from minicpm_jax.optim import mup"),
    ("minicpm_jax/config/x.py", "import jax"),
    ("minicpm_jax/text/x.py", "import tokenizers"),
    ("pallas_kernels/flash/x.py", "from minicpm_jax.core import types"),
    ("configs/x.py", "from minicpm_jax.train import loop"),
    ("minicpm_jax/train/x.py", "from experiments import quickstart"),
  ],
)
def test_a_forbidden_import_is_found(path, text):
  assert violations(ROOT / path, text)


def test_library_does_not_read_the_environment_at_import():
  """No os.environ write and no absl flag definition outside experiments (style.md rule 11)."""
  for path in source_files():
    module = path.relative_to(ROOT).as_posix()
    for node in ast.parse(path.read_text()).body:
      text = ast.unparse(node)
      is_def = isinstance(node, ast.FunctionDef | ast.ClassDef)
      if not is_def and not module.startswith("experiments"):
        assert "os.environ[" not in text and "DEFINE_" not in text, f"{module}: {text}"


def test_verbs_stay_short():
  """experiments/VERB.py is flags and main (style.md 2.1); what outgrows that moves to _*.py."""
  lengths = {p.name: len(p.read_text().splitlines()) for p in ROOT.glob("experiments/[!_]*.py")}
  assert lengths and {n: size for n, size in lengths.items() if size > 120} == {}
