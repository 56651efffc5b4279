"""What WiSparse is: score, thresholds, budgets, plan; arrays in, arrays out."""

from wisparse_jax.sparsity.apply import apply as apply
from wisparse_jax.sparsity.loading import convert as convert
from wisparse_jax.sparsity.loading import load as load
from wisparse_jax.sparsity.loading import own_plan as own_plan
from wisparse_jax.sparsity.plan import SparsityPlan as SparsityPlan
