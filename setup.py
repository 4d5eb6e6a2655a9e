"""Install: `pip install -e .[dev] -c constraints-3.11.txt` (or use the Makefile)."""

from setuptools import find_packages, setup

# Wheels end at Python 3.12; later ones compile, so the quickstart goes without.
FASTTEXT = [
  "fasttext-numpy2-wheel>=0.9.2; python_version < '3.13'",
  "fasttext-numpy2>=0.10.4; python_version >= '3.13'",
]
EXTRAS = {
  "gpu": ["jax[cuda13]", "jax-triton>=0.3.1"],
  "tpu": ["jax[tpu]"],
  "text": ["tokenizers>=0.22", "sentencepiece>=0.2", "jinja2>=3.1.6"],
  "gguf": ["gguf>=0.17"],
  "data": ["zstandard>=0.23", "pyarrow>=18", "py3langid>=0.4", *FASTTEXT],
  "html": ["trafilatura>=2", "lxml_html_clean>=0.4"],
  "dedup": ["semhash>=0.5"],
  "spark": ["pyspark>=4.0", "pandas<3"],
  "constrained": ["llguidance>=1.9"],
  "llamacpp": ["llama-cpp-python>=0.3.30"],  # compiles for half an hour: a peer, never required
  "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
  "plot": ["matplotlib>=3.9"],
  "bench": ["psutil>=6"],
  "oracle": ["torch>=2.6", "transformers>=5.17"],
}
EXTRAS["quickstart"] = sorted(
  {d for e in ("text", "gguf", "data", "plot") for d in EXTRAS[e]} - set(FASTTEXT)
)
EXTRAS["smoke"] = sorted(
  set(EXTRAS["quickstart"]) | {"pytest>=8", "hypothesis>=6.100", "beartype>=0.20"}
)
EXTRAS["dev"] = sorted(
  {
    dependency
    for extra in ("smoke", "data", "html", "bench", "oracle", "dedup", "constrained", "serve")
    for dependency in EXTRAS[extra]
  }
  | {"datasketch>=2", "ruff>=0.12", "nbclient>=0.10", "jupytext>=1.16", "ipykernel>=6.29"}
  | {"jax-triton>=0.3.1", "pytest-xdist>=3.6", "openai>=2", "httpx>=0.28", "jsonschema>=4.20"}
)

setup(
  name="minicpm_jax",
  version="0.1.0",
  description="MiniCPM and MiniCPM4 in JAX/Flax: models, training, sparse attention, decoding",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["minicpm_jax", "minicpm_jax.*", "pallas_kernels*"]),
  package_data={"pallas_kernels": ["*/tuned.json"], "minicpm_jax.infer.server": ["static/*"]},
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.17",
    "tensorstore>=0.1.80",
    "numpy>=2.0",
    "absl-py>=2.1",
    "safetensors>=0.5",
    "jaxtyping>=0.3",
    "rich>=13",
    "tensorboardX>=2.6",
  ],
  extras_require=EXTRAS,
)
