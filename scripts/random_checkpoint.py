"""A Hugging Face folder of a true shape with random weights, to time what reads files; as large as the real one.

    python scripts/random_checkpoint.py llama-3.1-8b OUT
    wisparse generate OUT --prompt "The first thing to do" --max-new-tokens 64

bfloat16, a file a block, with the demo model's tokenizer. What it writes is no text.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro
from safetensors.numpy import save_file
from tyro.conf import Positional

from wisparse_jax.errors import WisparseError
from wisparse_jax.files import new_folder
from wisparse_jax.models import tokenizer
from wisparse_jax.models.config import read_config
from wisparse_jax.models.hub import DEMO, resolve
from wisparse_jax.models.parameters import flat, hf_name, param_shapes
from wisparse_jax.models.weights import INDEX, transposed
from wisparse_jax.presets import shapes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a checkpoint of random weights."""

    shape: Positional[str]  # a file of configs/
    out: Positional[Path]
    blocks: int | None = None  # fewer than the shape has


def main() -> None:
    """Write the folder."""
    args = tyro.cli(Arguments, description=__doc__)
    try:
        if args.shape not in shapes():
            raise WisparseError(f"shape = {args.shape!r}: expected one of {', '.join(sorted(shapes()))}")
        with new_folder(args.out, WisparseError) as folder:
            write(folder, shapes()[args.shape], args.blocks)
    except WisparseError as error:
        sys.exit(f"random_checkpoint: {error}")


def write(folder: Path, shape: Path, blocks: int | None) -> None:
    """Weights, their index, config.json and a tokenizer."""
    raw = json.loads(shape.read_text()) | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    raw |= {} if blocks is None else {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    demo = resolve(DEMO, ("tokenizer",))
    for name in tokenizer.files(demo):
        shutil.copy(demo / name, folder)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in flat(param_shapes(read_config(folder))).items():
        part = path.split(".")[1] if path.startswith("blocks.") else "rest"
        size = leaf.shape[::-1] if transposed(path) else leaf.shape
        files.setdefault(f"model-{part}.safetensors", {})[hf_name(path)] = size
    # Drawn once: every file begins elsewhere in it, the tensors of a file at the same place.
    drawn = (0.02 * np.random.default_rng(0).standard_normal(1 << 24, np.float32)).astype(ml_dtypes.bfloat16)

    def save(number: int, file: str) -> None:
        some = np.roll(drawn, 7919 * number)
        tensors = {
            name: np.resize(some, size) if len(size) == 2 else np.ones(size, drawn.dtype)
            for name, size in files[file].items()
        }
        save_file(tensors, folder / file)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(len(files)), files))
    total = sum((folder / file).stat().st_size for file in files)
    where = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))


if __name__ == "__main__":
    main()
