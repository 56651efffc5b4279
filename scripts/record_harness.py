"""Record what lm-evaluation-harness's own Hugging Face model says of the demo model, for tests/test_harness.py.

Needs torch, transformers, accelerate and lm_eval 0.4.13 beside this package. From the top of the checkout:

    PYTHONPATH=. python scripts/record_harness.py [BLIMP]

Writes tests/fixtures/harness.json: log-likelihoods of sentences of ours, and the accuracy. With BLIMP, a file of
BLiMP's pairs (jsonl or jsonl.xz), also the numbers of 200 of them, evenly spaced, without their text.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
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


def write_task(folder: Path, pairs: list[tuple[str, str]], name: str = "pairs") -> Path:
    """A task of minimal pairs in the way of BLiMP: the better sentence is the likelier one."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"good": good, "bad": bad}) + "\n" for good, bad in pairs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def run_task(lm: Any, folder: Path, name: str = "pairs") -> dict[str, Any]:
    """The harness's results of one of these tasks."""
    # Types are checked with and without the harness.
    harness: Any = importlib.import_module("lm_eval")
    tasks: Any = importlib.import_module("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return harness.simple_evaluate(lm, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0)


def scored(lm: Any, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """A model's accuracy on pairs, and the log-likelihood of every sentence, nats."""
    with tempfile.TemporaryDirectory() as folder:
        results = run_task(lm, write_task(Path(folder), pairs))
    samples = sorted(results["samples"]["pairs"], key=lambda sample: sample["doc_id"])
    found = [[round(float(response[0][0]), 5) for response in sample["resps"]] for sample in samples]
    return {"accuracy": results["results"]["pairs"]["acc,none"], "log_likelihoods": found}


def main() -> None:
    """Score, and write the fixture."""
    from blimp import read_pairs

    model: Any = importlib.import_module("lm_eval.models.huggingface")
    lm = model.HFLM(pretrained=str(Path("wisparse_jax") / "demo_model"), dtype="float32", device="cpu", batch_size=8)
    packages = ("lm_eval", "torch", "transformers")
    record: dict[str, Any] = {"versions": {name: version(name) for name in packages}}
    record["ours"] = scored(lm, PAIRS)
    if len(sys.argv) > 1:
        record["blimp"] = scored(lm, read_pairs(Path(sys.argv[1]), BLIMP_PAIRS))
    FIXTURE.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print({name: value["accuracy"] for name, value in record.items() if "accuracy" in value})


if __name__ == "__main__":
    main()
