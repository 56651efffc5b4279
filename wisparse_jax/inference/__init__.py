"""How tokens come out: sampling, the decode loop, and text that a model writes itself."""

from wisparse_jax.inference.generate import generate as generate
from wisparse_jax.inference.openers import openers_for as openers_for
from wisparse_jax.inference.sampling import GREEDY as GREEDY
from wisparse_jax.inference.sampling import Sample as Sample
from wisparse_jax.inference.self_text import sample_windows as sample_windows
from wisparse_jax.inference.steps import decode_implementation as decode_implementation
from wisparse_jax.inference.stream import TextStream as TextStream
from wisparse_jax.inference.text import encode_prompt as encode_prompt
from wisparse_jax.inference.text import stream as stream
