"""Files and folders: one bounded reader of what others wrote, one writer of what is ours."""

from wisparse_jax.files.folders import check_new_folder, new_folder
from wisparse_jax.files.paths import expanded
from wisparse_jax.files.reading import check_regular, read_bytes, read_json, read_yaml, shown

__all__ = [
    "check_new_folder",
    "check_regular",
    "expanded",
    "new_folder",
    "read_bytes",
    "read_json",
    "read_yaml",
    "shown",
]
