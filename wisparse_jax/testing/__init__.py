"""What tests share, ours and users': a tiny model, a count of compilations, lowering for a GPU that is not there."""

from wisparse_jax.testing.compilations import count_compilations as count_compilations
from wisparse_jax.testing.lowering import lower_for_gpu as lower_for_gpu
from wisparse_jax.testing.tiny import tiny_config as tiny_config
from wisparse_jax.testing.tiny import tiny_model as tiny_model
