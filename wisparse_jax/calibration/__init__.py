"""What is measured on calibration text: the dense run, statistics, gradients and costs, thresholds."""

from wisparse_jax.calibration.dense import Calibration as Calibration
from wisparse_jax.calibration.dense import run_dense as run_dense
from wisparse_jax.calibration.settings import TextSettings as TextSettings
from wisparse_jax.calibration.variety import check_variety as check_variety
