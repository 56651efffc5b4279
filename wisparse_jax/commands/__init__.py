"""The commands of `wisparse`, a module each: their arguments, and the library's functions called.

Nothing heavy is imported before a command runs, so that `--help` is quick. What can be refused is refused before a
model is loaded.
"""
