"""The commands that take bits in place of a sparsity."""

import json
import re

import pytest

import wisparse_jax as ws
from wisparse_jax.testing import PROSE, run

SETTINGS = """\
window: 64
tokens: 512
statistics_tokens: 64
compare_teal: false
absolute_steps: 2
skipped_steps: 2
heads_steps: 2
gradient_tokens: 64
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planes")
    (folder / "settings.yaml").write_text(SETTINGS)
    (folder / "text.txt").write_text(PROSE * 40)
    search = "--config {f}/settings.yaml --text {f}/text.txt"
    run(f"calibrate demo --out {{f}}/plan --bits 3.3 {search}", folder)
    run(f"calibrate demo --out {{f}}/wina --method uniform {search}", folder)
    return folder


def test_a_plan_is_evaluated_at_any_bits(files, capsys):
    plan = ws.SparsityPlan.load(files / "plan")
    assert plan.method == "planes" and plan.bits == pytest.approx(3.3)
    found = {}
    for bits in ("", "--bits 2.2", "--bits 6"):
        run(f"evaluate demo --plan {{f}}/plan --text {{f}}/text.txt --window 64 --tokens 256 --json {bits}", files)
        found[bits] = json.loads(capsys.readouterr().out)
    assert found["--bits 6"]["kl"] < found[""]["kl"] < found["--bits 2.2"]["kl"]
    assert found["--bits 6"]["sparsity"] < found[""]["sparsity"] < found["--bits 2.2"]["sparsity"]


def test_text_is_generated_at_any_bits(files, capsys):
    run("generate demo --plan {f}/plan --bits 2.7 --prompt The --max-new-tokens 3", files)
    assert "planes plan, 2.7 bits a weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate demo --bits 3 --prompt The", "bits = 3.0: expected a plan for planes, found none"),
        ("generate demo --plan {f}/wina --bits 3 --prompt The", "expected a plan for planes, found one of uniform"),
        ("generate demo --plan {f}/plan --bits 9 --prompt The", r"bits = 9: expected .* to 8.125"),
        ("generate demo --plan {f}/plan --weights int8 --prompt The", "weights = 'int8': the plan is for"),
        ("evaluate demo --text {f}/text.txt --bits 3", "bits = 3.0: expected a plan for planes, found none"),
        ("calibrate demo --out {f}/x --bits 3 --sparsity 0.5", "expected one of --bits, --sparsity and --max-kl"),
        ("calibrate demo --out {f}/x --bits 30", "bits = 30.0: expected a number above 0, at most 8.125"),
        ("calibrate demo --out {f}/x --bits 3 --method teal", "expected a method for weights in planes"),
    ],
)
def test_bits_that_mean_nothing_are_one_line(files, capsys, command, message):
    with pytest.raises(SystemExit):
        run(command, files)
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert "Traceback" not in captured.err and not (files / "x").exists()
