"""What tests share, ours and users': a tiny model, and a count of compilations."""

from wisparse_jax.testing.compilations import count_compilations as count_compilations
from wisparse_jax.testing.tiny import tiny_config as tiny_config
from wisparse_jax.testing.tiny import tiny_model as tiny_model
