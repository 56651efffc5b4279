"""How fast decoding is: dense and sparse steps of one model, timed in one run."""

from wisparse_jax.benchmark.decode import Options as Options
from wisparse_jax.benchmark.decode import benchmark as benchmark
