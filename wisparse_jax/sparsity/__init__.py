"""What WiSparse is: score, thresholds, budgets, plan; arrays in, arrays out."""

from wisparse_jax.sparsity.apply import SparseLlama as SparseLlama
from wisparse_jax.sparsity.apply import apply as apply
from wisparse_jax.sparsity.apply import apply_plans as apply_plans
from wisparse_jax.sparsity.apply import load_sparse as load_sparse
from wisparse_jax.sparsity.converted import convert_with_plan as convert_with_plan
from wisparse_jax.sparsity.converted import own_plan as own_plan
from wisparse_jax.sparsity.methods import METHODS as METHODS
from wisparse_jax.sparsity.plan import SparsityPlan as SparsityPlan
