"""The public packages: what they hand out, and that importing them costs nothing."""

import pkgutil
import subprocess
import sys

import pytest

import minicpm_jax as mc
from minicpm_jax import infer


def test_every_module_is_an_attribute_of_its_package():
  """In a fresh process, where nothing has been imported by another way."""
  paths = [m.name for m in pkgutil.walk_packages(mc.__path__)]
  assert {"tunnel", "align", "ckpt", "core"} <= set(paths)
  packages = [p for p in paths if p != "core"]  # core's modules are imported by their full names
  inside = [
    f"{p}.{m.name}" for p in packages for m in pkgutil.iter_modules([f"{mc.__path__[0]}/{p}"])
  ]
  assert len(inside) > 100
  text = "import sys, minicpm_jax as mc\nassert 'jax' not in sys.modules\n"
  text += "".join(f"mc.{path}\n" for path in (*paths, *inside))
  done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_names_come_out_of_their_modules_and_others_are_refused():
  assert infer.Chat.__module__ == "minicpm_jax.infer.chat" and "Chat" in dir(infer)
  assert {"generate", "drafters"} <= set(dir(infer))
  with pytest.raises(AttributeError, match="'minicpm_jax.infer' has no attribute 'no_such'"):
    infer.no_such  # noqa: B018
  assert not hasattr(mc, "no_such")
