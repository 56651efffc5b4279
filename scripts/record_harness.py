"""Record what lm-evaluation-harness's own Hugging Face model says of the demo model, for tests/test_harness.py.

Needs torch, transformers, accelerate and lm_eval 0.4.13 beside this package. From the top of the checkout:

    PYTHONPATH=. python scripts/record_harness.py [BLIMP]

Writes tests/fixtures/harness.json: log-likelihoods of sentences of ours, and the accuracy. With BLIMP, a file of
BLiMP's pairs (jsonl or jsonl.xz), also the numbers of 200 of them, evenly spaced, without their text.

    PYTHONPATH=. python scripts/record_harness.py --compare MODEL BLIMP GSM8K TEXT

compares that model with this package's on a model with a chat template, in float32: 40 samples each of five kinds of
tasks, whose scores and texts must be equal, and how often each first token is drawn. GSM8K is jsonl or jsonl.xz with
questions and answers.
"""

from __future__ import annotations

import importlib
import itertools
import json
import lzma
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAIRS = [
    ("The boys were in the garden.", "The boys was in the garden."),
    ("She had seen them before.", "She had saw them before."),
    ("I do not know what to say.", "I does not know what to say."),
    ("He looked at himself.", "He looked at herself."),
    ("The women who sang were tired.", "The women who sang was tired."),
    ("These houses are old.", "This houses are old."),
    ("The king gave himself a name.", "The king gave themselves a name."),
    ("Nobody has ever seen it.", "Somebody has ever seen it."),
    ("What did you say to her?", "What did you said to her?"),
    ("They went home after the rain had stopped.", "They gone home after the rain had stopped."),
    ("The letters on the table belong to me.", "The letters on the table belongs to me."),
    ("A ship was lost in the storm.", "A ship were lost in the storm."),
]
FIXTURE = Path("tests") / "fixtures" / "harness.json"
BLIMP_PAIRS = 200


SAMPLES = 40
DRAWS = 600


def read_pairs(path: Path, pairs: int) -> list[tuple[str, str]]:
    """Good and bad sentences of a file of BLiMP's pairs, plain or xz; `pairs` of them, evenly spaced."""
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["sentence_good"], row["sentence_bad"]) for row in (rows[i * len(rows) // pairs] for i in range(pairs))]


def write_task(folder: Path, pairs: list[tuple[str, str]], name: str = "pairs") -> Path:
    """A task of minimal pairs in the way of BLiMP: the better sentence is the likelier one."""
    config = {"output_type": "multiple_choice", "doc_to_text": "", "doc_to_target": 0, "metric_list": [_mean("acc")]}
    rows = [{"good": good, "bad": bad} for good, bad in pairs]
    return write(folder, name, rows, config | {"doc_to_choice": "{{[good, bad]}}"})


def write(folder: Path, name: str, rows: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """A task with local data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task | config))  # JSON is YAML
    return folder


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def run_task(lm: Any, folder: Path, name: str = "pairs", **options: Any) -> dict[str, Any]:
    """The harness's results of one of these tasks."""
    # Types are checked with and without the harness.
    harness: Any = importlib.import_module("lm_eval")
    tasks: Any = importlib.import_module("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    how = {"task_manager": manager, "log_samples": True, "bootstrap_iters": 0}
    return harness.simple_evaluate(lm, tasks=[name], **how, **options)


def scored(lm: Any, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """A model's accuracy on pairs, and the log-likelihood of every sentence, nats."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_task(lm, write_task(Path(folder), pairs))
    samples = sorted(results["samples"]["pairs"], key=lambda sample: sample["doc_id"])
    found = [[round(float(response[0][0]), 5) for response in sample["resps"]] for sample in samples]
    return {"accuracy": results["results"]["pairs"]["acc,none"], "log_likelihoods": found}


def write_comparison(folder: Path, blimp: Path, gsm8k: Path, text: Path) -> dict[str, dict[str, Any]]:
    """Five kinds of tasks, and the options that each is run with."""
    opened = lzma.open if gsm8k.suffix == ".xz" else open
    with opened(gsm8k, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in itertools.islice(file, SAMPLES)]
    finals = [problem["answer"].rpartition("#### ")[2].strip() for problem in problems]
    choices = [[finals[(i + k) % SAMPLES] for k in (0, 1, 2, 3)] for i in range(SAMPLES)]
    lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines()]
    paragraphs = [line for line in lines if len(line) > 400 and not line.startswith("=")][:SAMPLES]
    sentences = [good for good, _ in read_pairs(blimp, SAMPLES)]

    write_task(folder, read_pairs(blimp, SAMPLES))
    questions = [{"question": problem["question"]} for problem in problems]
    chosen = [row | {"choices": four} for row, four in zip(questions, choices, strict=True)]
    shared = {"doc_to_text": "Question: {{question}}\nAnswer:", "metric_list": [_mean("acc")]}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    write(folder, "answers", chosen, shared | choice)
    perplexity = [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write(folder, "rolling", [{"text": line} for line in paragraphs], rolling | {"metric_list": perplexity})
    copies = {"output_type": "generate_until", "doc_to_target": "{{text}}", "metric_list": [_mean("exact_match")]}
    copies["doc_to_text"] = "Repeat word for word, and write nothing else: {{text}}"
    stops = {"generation_kwargs": {"until": ["<|im_end|>", "\n\n", "Question:"], "max_gen_toks": 24}}
    write(folder, "stops", [{"text": line} for line in sentences], copies | stops)
    # Sampled, with settings that leave one token to draw: texts are equal whatever the generator of noise.
    settings = {"do_sample": True, "temperature": 0.8, "min_p": 1.0, "repetition_penalty": 1.2, "max_gen_toks": 24}
    several = {"repeats": 2, "generation_kwargs": settings | {"until": []}, "doc_to_text": "{{question}}"}
    write(folder, "settings", questions, copies | several | {"doc_to_target": "{{question}}"})
    return {"pairs": {}, "answers": {}, "rolling": {}, "stops": {"apply_chat_template": True}, "settings": {}}


def compare(theirs: Any, ours: Any, folder: Path, tasks: dict[str, dict[str, Any]]) -> None:
    """Print both models' scores of each task, how far they are apart, and texts that differ."""
    for name, options in tasks.items():
        found = [run_task(lm, folder, name, **options) for lm in (theirs, ours)]
        scores = [{k: v for k, v in run["results"][name].items() if "stderr" not in k} for run in found]
        for key, value in scores[0].items():
            if isinstance(value, float):
                print(f"{name}: {key}: {value:.6f} and {scores[1][key]:.6f}")
        samples = [sorted(run["samples"][name], key=lambda sample: sample["doc_id"]) for run in found]
        pairs = [
            (a, b)
            for one, other in zip(*samples, strict=True)
            for request, answer in zip(one["resps"], other["resps"], strict=True)
            for a, b in zip(request, answer, strict=True)
        ]
        if isinstance(pairs[0][0], str):
            differing = [pair for pair in pairs if pair[0] != pair[1]]
            print(f"{name}: {len(pairs) - len(differing)} of {len(pairs)} texts are equal", *differing, sep="\n  ")
        else:
            numbers = [[float(part[0] if isinstance(part, list | tuple) else part) for part in pair] for pair in pairs]
            print(f"{name}: {len(pairs)} log-likelihoods, apart by {max(abs(a - b) for a, b in numbers):.2e} at most")


def compare_draws(theirs: Any, ours: Any) -> None:
    """Print how likely the two models' first tokens are to come from one distribution."""
    scipy_stats: Any = importlib.import_module("scipy.stats")
    instance: Any = importlib.import_module("lm_eval.api.instance").Instance
    for more in (
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 0, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 8, "repetition_penalty": 1.5},
    ):
        asked = {"until": [], "max_gen_toks": 1, "do_sample": True, **more}
        request = instance("generate_until", {}, ("The old man said that the old", asked), 0)
        a, b = (Counter(lm.generate_until([request] * DRAWS, disable_tqdm=True)) for lm in (theirs, ours))
        common = [text for text in {*a, *b} if a[text] + b[text] >= 10]
        rest = [DRAWS - sum(count[text] for text in common) for count in (a, b)]
        columns = [[a[text], b[text]] for text in common] + ([rest] if min(rest) else [])
        p = float(scipy_stats.chi2_contingency(columns).pvalue)
        print(f"{more}: {len(a)} and {len(b)} tokens in {DRAWS} draws, p = {p:.3f}")


def main() -> None:
    """Score, and write the fixture or print the comparison."""
    model: Any = importlib.import_module("lm_eval.models.huggingface")
    own = dict(dtype="float32", device="cpu")
    if sys.argv[1:2] == ["--compare"]:
        from wisparse_jax.harness import WisparseLM

        name, *data = sys.argv[2:]
        theirs = model.HFLM(pretrained=name, batch_size=1, **own)
        ours = WisparseLM(name, dtype="float32", batch_size=4)
        with tempfile.TemporaryDirectory() as folder:
            tasks = write_comparison(Path(folder), *map(Path, data))
            compare(theirs, ours, Path(folder), tasks)
        theirs.batch_size_per_gpu, ours.batch_size = 64, 64
        compare_draws(theirs, ours)
        return
    lm = model.HFLM(pretrained=str(Path("wisparse_jax") / "demo_model"), batch_size=8, **own)
    packages = ("lm_eval", "torch", "transformers")
    record: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
    record["ours"] = scored(lm, PAIRS)
    if len(sys.argv) > 1:
        record["blimp"] = scored(lm, read_pairs(Path(sys.argv[1]), BLIMP_PAIRS))
    FIXTURE.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print({name: value["accuracy"] for name, value in record.items() if "accuracy" in value})


if __name__ == "__main__":
    main()
