"""Standard modules are imported where they are used (F821 is off, for jaxtyping)."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = [
  path
  for folder in ("minicpm_jax", "experiments", "configs", "pallas_kernels")
  for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("folder", ["minicpm_jax", "experiments", "configs", "pallas_kernels"])
def test_standard_modules_are_imported(folder):
  for path in (p for p in FILES if p.relative_to(ROOT).parts[0] == folder):
    used, known = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        used.add(node.value.id)
      elif isinstance(node, ast.Import | ast.ImportFrom):
        known |= {(a.asname or a.name).split(".")[0] for a in node.names}
      elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        known.add(node.id)
      elif isinstance(node, ast.arg):
        known.add(node.arg)
    missing = (used & sys.stdlib_module_names) - known
    assert not missing, f"{path.relative_to(ROOT)}: {sorted(missing)} used, not imported"
