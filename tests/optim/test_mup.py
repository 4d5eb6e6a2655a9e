"""Roles by path and the learning-rate table of MiniCPM Table 7."""

import pytest

from minicpm_jax import config
from minicpm_jax.optim import mup

ROLES = {
  "embed/embedding": "embedding",
  "lm_head/kernel": "head",
  "final_norm/scale": "norm",
  "layers/attn_norm/scale": "norm",
  "layers/attn/q/kernel": "matrix",
  "layers/attn/o/kernel": "matrix",
  "layers_11/mlp/down/kernel": "matrix",
  "layers/attn/q_a/kernel": "matrix",
  "layers/attn/kv_a_norm/scale": "norm",
  "layers/attn/kv_b/kernel": "matrix",
  "layers/moe/router/kernel": "router",
  "layers/moe/gate/kernel": "matrix",
  "mtp/proj/kernel": "matrix",
  "mtp/embed_norm/scale": "norm",
  "mtp/layer/mlp/up/kernel": "matrix",
  "some/bias": "vector",
}


def model(width=2304, **kw):
  return config.ModelConfig(
    vocab_size=8,
    model_dim=width,
    mlp_dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_position=8,
    **{"dim_model_base": 256, **kw},
  )


@pytest.mark.smoke
@pytest.mark.parametrize("path, role", ROLES.items(), ids=ROLES)
def test_role_of_every_kind_of_leaf(path, role):
  assert mup.role_of(path) == role


@pytest.mark.parametrize(
  "width, peak, matrix_lr",
  [(2304, 0.01, 0.00111), (1536, 0.01, 0.00167), (4096, 7e-3, 4.4e-4)],
)
def test_matrix_learning_rates_of_the_released_models(width, peak, matrix_lr):
  assert peak * mup.lr_scale(model(width), "matrix") == pytest.approx(matrix_lr, rel=0.01)


def test_both_readings_of_the_embedding():
  assert mup.lr_scale(model(mup_embedding="matrix"), "embedding") == 1 / 9
  assert mup.lr_scale(model(mup_embedding="vector"), "embedding") == 1.0
  for reading in ("matrix", "vector"):
    for role in ("matrix", "head", "router"):
      assert mup.lr_scale(model(mup_embedding=reading), role) == 1 / 9
    assert mup.lr_scale(model(mup_embedding=reading), "norm") == 1.0
  assert mup.lr_scale(model(dim_model_base=None), "matrix") == 1.0  # Llama: muP is off


@pytest.mark.parametrize("path", ["layers/attn/q/weight", "kernels"])
def test_an_unknown_leaf_name_is_refused(path):
  with pytest.raises(ValueError, match=path):
    mup.role_of(path)
