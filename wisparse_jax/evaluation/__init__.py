"""How good a plan is: perplexity, KL, realised sparsity."""

from wisparse_jax.evaluation.quality import DenseRun as DenseRun
from wisparse_jax.evaluation.quality import evaluate as evaluate
from wisparse_jax.evaluation.scores import Evaluation as Evaluation
from wisparse_jax.evaluation.scores import Figure as Figure
from wisparse_jax.evaluation.scores import Score as Score
from wisparse_jax.evaluation.scores import SparseScore as SparseScore
from wisparse_jax.evaluation.shares import rivals_of as rivals_of
from wisparse_jax.evaluation.windows import split_windows as split_windows
from wisparse_jax.evaluation.windows import text_windows as text_windows
