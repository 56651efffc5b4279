"""`wisparse benchmark` without the command line's setting that XLA must choose the same products in every run.

python scripts/benchmark_decode.py llama-3.1-8b --weights stored int8 int4 --head stored int8 --sparsity 0.5 0.4
"""

from __future__ import annotations

import tyro

from wisparse_jax.commands.benchmark import Benchmark

if __name__ == "__main__":
    tyro.cli(Benchmark, description=__doc__).run()
