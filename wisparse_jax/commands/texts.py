"""The text that a command calibrates or measures on."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wisparse_jax.errors import WisparseError
from wisparse_jax.files import expanded

if TYPE_CHECKING:
    import numpy as np

    from wisparse_jax.models.model import Model
    from wisparse_jax.sparsity import SparsityPlan

SELF = "self"
JOINED = " + "  # of the names of several texts, in a record


def check_text(text: str) -> None:
    """Refuse a text that is not there.

    Raises:
        WisparseError: no such file.
    """
    if text != SELF and not expanded(text).is_file():
        raise WisparseError(f"{text}: no such file")


def evaluation_seed(asked: int | None, plans: Mapping[str, SparsityPlan]) -> int:
    """The seed of sampled text to score plans on, which none of them may have been calibrated on.

    What is sampled depends on the seed and the window's number, so that another length of windows is no other text.

    Raises:
        WisparseError: the seed that was asked for is that of a plan's own text.
    """
    taken = {plan.seed: name for name, plan in plans.items() if _is_of(plan, SELF)}
    if asked is None:
        return next(seed for seed in range(1, len(taken) + 2) if seed not in taken)
    if asked in taken:
        raise WisparseError(f"seed = {asked}: samples the text that {taken[asked]} was calibrated on: expected another")
    return asked


def note_own_texts(text: str, plans: Mapping[str, SparsityPlan]) -> None:
    """Say which plans were calibrated on a file of that name."""
    for name, plan in plans.items():
        if text != SELF and _is_of(plan, Path(text).name):
            print(
                f"{name} was calibrated on a text of the same name: what a plan was fitted to flatters it",
                file=sys.stderr,
            )


def _is_of(plan: SparsityPlan, text: str) -> bool:
    """Whether a plan's record names a text, or says of the sampled one how it begins."""
    named = str(plan.calibration.get("text")).split(JOINED)
    return any(name == text or (text == SELF and name.startswith(f"{SELF} (")) for name in named)


class Texts:
    """The windows of one or several texts, each giving an equal share of them.

    The texts take turns, so that any stretch of the windows, the held-out one too, has its share of each. Files are
    read at once, by the tokenizer of the model of that name; what the model itself writes is sampled by `windows`.

    Args:
        name: of the model.
        texts: files, or "self".
        window: tokens in a window, at most the model's context.
        tokens: in all, rounded up to whole windows; a file that is short of its share gives what it has.

    Raises:
        WisparseError: a file cannot be read, or is too short or too monotonous; a text is named twice.
    """

    def __init__(self, name: str, texts: Sequence[str], window: int, tokens: int):
        from wisparse_jax.models import hub
        from wisparse_jax.models.loading import read_model_config

        if not texts or len(set(texts)) < len(texts):
            raise WisparseError(f"text = {' '.join(texts)}: expected at least one text, and none twice")
        self.name, self.texts = name, tuple(texts)
        self.window = min(window, read_model_config(hub.resolve(name, ("config",))).context)
        whole = -(-tokens // self.window)
        if whole < len(texts):
            raise WisparseError(f"tokens = {tokens}: expected a window of {self.window} for each of {len(texts)} texts")
        counts = [-(-(whole - k) // len(texts)) for k in range(len(texts))]
        self._files = {
            text: file_windows(name, text, self.window, count * self.window)
            for text, count in zip(texts, counts, strict=True)
            if text != SELF
        }
        self._sampled = next((count for text, count in zip(texts, counts, strict=True) if text == SELF), 0)
        self.record = JOINED.join(short_name(text) for text in texts)
        self.kinds: tuple[str, ...] = ()

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the model is to write."""
        return self._sampled * self.window

    @property
    def count(self) -> int:
        """How many windows there are in all."""
        return self._sampled + sum(map(len, self._files.values()))

    def windows(self, model: Model, seed: int) -> np.ndarray:
        """All windows; `record` says afterwards what the sampled ones begin with, and `kinds` what each window is of.

        Raises:
            WisparseError: as `sampled_windows`.
        """
        import numpy as np

        parts = dict(self._files)
        kinds: dict[str, tuple[str, ...]] = {text: (short_name(text),) for text in self.texts}
        if self._sampled:
            how = model, self.name, self.window, self.sampled_tokens, seed
            parts[SELF], begun, opened = sampled_windows(*how)
            kinds[SELF] = tuple(f"{SELF}, {kind}" for kind in opened) or kinds[SELF]
            self.record = JOINED.join(begun if text == SELF else short_name(text) for text in self.texts)
        # Where in the whole a window would stand if its text were spread evenly.
        places = [
            ((i + 0.5) / len(parts[text]), k, i) for k, text in enumerate(self.texts) for i in range(len(parts[text]))
        ]
        order = [(self.texts[k], i) for _, k, i in sorted(places)]
        self.kinds = tuple(kinds[text][i % len(kinds[text])] for text, i in order)
        return np.stack([parts[text][i] for text, i in order])


def short_name(text: str) -> str:
    """What a record calls a text: no folders of this machine."""
    return text if text == SELF else Path(text).name


def file_windows(name: str, text: str, window: int, tokens: int) -> np.ndarray:
    """Windows of a file, by the tokenizer of the model of that name; the model itself is not loaded.

    Raises:
        WisparseError: the file cannot be read, or is too short or too monotonous.
    """
    from wisparse_jax.calibration import check_variety
    from wisparse_jax.evaluation import text_windows
    from wisparse_jax.models import hub
    from wisparse_jax.models.loading import load_tokenizer, read_model_config

    config = read_model_config(hub.resolve(name, ("config",)))
    windows = text_windows(load_tokenizer(name), text, min(window, config.context), tokens)
    check_variety(windows, config.vocab_size)
    return windows


def sampled_windows(
    model: Model, name: str, window: int, tokens: int, seed: int
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Windows that the model samples, going on from openers of many kinds; what a record says of them; and the openers'
    kinds, of which window w begins with number w.

    A model without a tokenizer begins its documents itself, which is said.

    Raises:
        WisparseError: they repeat themselves, or the model's activations overflow on them.
    """
    from wisparse_jax.calibration import check_variety, run_dense
    from wisparse_jax.inference import sample_windows
    from wisparse_jax.inference.openers import NONE, openers_for
    from wisparse_jax.models.loading import load_tokenizer
    from wisparse_jax.processes import is_first

    try:
        openers = openers_for(load_tokenizer(name))
    except WisparseError as error:
        print(f"{error}; the model begins its documents itself", file=sys.stderr)
        openers = NONE
    window = min(window, model.config.context)
    windows = sample_windows(model, -(-tokens // window), window, seed=seed, progress=is_first(), openers=openers)
    try:
        check_variety(windows, model.config.vocab_size)
    except WisparseError:
        run_dense(model, windows[:1])  # names the layer: a model that overflows repeats a token for ever
        raise
    return windows, f"{SELF} ({openers})" if openers.kinds else SELF, openers.kinds
