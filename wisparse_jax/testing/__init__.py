"""What tests share, ours and users': a tiny model, prose, a count of compilations, lowering for a pretended GPU."""

from wisparse_jax.testing.commands import PROSE as PROSE
from wisparse_jax.testing.commands import run as run
from wisparse_jax.testing.compilations import count_compilations as count_compilations
from wisparse_jax.testing.compilations import jit_as_written as jit_as_written
from wisparse_jax.testing.folders import write_tiny_folder as write_tiny_folder
from wisparse_jax.testing.lists import listed_channels as listed_channels
from wisparse_jax.testing.lowering import lower_for_gpu as lower_for_gpu
from wisparse_jax.testing.numbers import normal as normal
from wisparse_jax.testing.numbers import relative_error as relative_error
from wisparse_jax.testing.tiny import tiny_config as tiny_config
from wisparse_jax.testing.tiny import tiny_model as tiny_model
