"""Eight devices give the numbers of one."""

import os
import subprocess
import sys

PROGRAM = """
import jax, numpy as np
import wisparse_jax
from wisparse_jax.calibration import run_dense
from wisparse_jax.search import SearchSettings
from wisparse_jax.search.allocators import get_allocator
from wisparse_jax.search.losses import KLLoss
from wisparse_jax.search.problem import BudgetProblem
from wisparse_jax.testing import tiny_model

jax.config.update("jax_disable_most_optimizations", True)
assert len(jax.local_devices()) == 8
settings = SearchSettings(population=4, generations=2, block_tokens=48, chunk=2)
model = tiny_model()
tokens = jax.random.randint(jax.random.key(1), (2, 48), 0, 97)
calibration, exponents = run_dense(model, tokens, settings), np.zeros((3, 7))
rng = np.random.default_rng(0)
for count in (1, 5, 19):
    budgets = rng.uniform(0.2, 0.8, (count, 3, 7))
    tables = [s.thresholds(exponents[b], budgets[:, b]) for b, s in enumerate(calibration.statistics)]
    thresholds = np.stack(tables, axis=1)
    one, all_ = (KLLoss(calibration, 48, 2, devices)(exponents, thresholds) for devices in (jax.devices()[:1], None))
    np.testing.assert_allclose(all_, one, rtol=1e-6)
    assert len(one) == count and (one > 0).all()


def plan(devices):
    problem = BudgetProblem(calibration, exponents, settings, 0)
    problem.__dict__["_kl_loss"] = KLLoss(calibration, 48, 2, devices)
    return get_allocator("evolution")(problem).sparsities


np.testing.assert_array_equal(plan(None), plan(jax.devices()[:1]))
print("the same")
"""


def test_eight_devices_give_the_numbers_and_the_plan_of_one(repository):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=repository
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "the same"
