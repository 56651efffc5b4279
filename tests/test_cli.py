"""The command line, on the demo model, with searches cut to seconds."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import jax
import pytest

import wisparse_jax as ws
from wisparse_jax.cli import main
from wisparse_jax.inference import sample_windows
from wisparse_jax.sparsity import SparsityPlan
from wisparse_jax.testing import PROSE, run, write_tiny_folder

SETTINGS = """\
window: 64
tokens: 128
statistics_tokens: 64
search_exponents: false
compare_teal: false
allocator: uniform
absolute_steps: 2
skipped_steps: 2
heads_steps: 2
gradient_tokens: 64
training_steps: 2
training_every: 1
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A settings file, a text, a plan and what cannot be used."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "settings.yaml").write_text(SETTINGS)
    (folder / "text.txt").write_text(PROSE * 20)
    (folder / "short.txt").write_text("Too short.")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "bad.yaml").write_text("tokenz: 3")
    (folder / "dull.txt").write_text("ha " * 3000)
    (folder / "marked.txt").write_text("\ufeff" + PROSE * 20)
    (folder / "empty").mkdir()
    run("calibrate demo --out {f}/plan --config {f}/settings.yaml --text {f}/text.txt --method wina", folder)
    return folder


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "calibrate", "evaluate", "generate", "convert"))


def test_help_reads_like_the_documentation(capsys):
    """An argument is called what it is, and no default is printed where there is none."""
    for command in (
        "calibrate",
        "evaluate",
        "sweep",
        "generate",
        "chat",
        "convert",
        "benchmark",
        "report",
        "show",
        "push",
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert re.search(r"MODEL|PLAN", out.splitlines()[0]), command
        assert not re.search(r"\{None\}|default: (None|False)?\s*\)|--no-json", out), command
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    out = capsys.readouterr().out
    assert out.index("--out PATH") < out.index("--mesh STR")  # what few need comes last


def test_none_is_a_word_like_any_other(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "demo", "--prompt", "a", "--plan", "None"])
    assert "None: expected a plan folder, found no such folder" in capsys.readouterr().err


def test_the_version_comes_with_those_of_what_computes(capsys):
    main(["--version"])
    found = capsys.readouterr().out
    assert re.fullmatch(
        rf"wisparse_jax {re.escape(ws.__version__)}, jax [\d.]+, flax .*, Python 3\.\d+\.\d+, .*\n", found
    )


@pytest.mark.parametrize("own", ["", "--xla_dump_to=x", "--xla_gpu_deterministic_ops=false"])
def test_a_gpus_products_are_not_chosen_by_timing_unless_asked_for(monkeypatch, own):
    monkeypatch.setenv("XLA_FLAGS", own)
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ([own] if "false" in own else [*own.split(), "--xla_gpu_deterministic_ops=true"])


def test_json_is_one_object_and_nothing_else(files, capsys):
    run("evaluate demo --text {f}/text.txt --plan {f}/plan --json", files)
    out = json.loads(capsys.readouterr().out)
    assert out["perplexity"] > out["dense_perplexity"] > 1
    assert out["kl"] > 0 and 0.3 < out["sparsity"] < 0.7 and out["tokens"] > 0
    assert out["sparse_prefill"] == 0.5 and out["method"] == "wina (allocator uniform)" and out["window"] == 512
    run("evaluate demo --text {f}/text.txt --json --window 128 --tokens 256", files)
    dense = json.loads(capsys.readouterr().out)
    assert "kl" not in dense and dense["windows"] == 2 and dense["tokens"] == 2 * 63


def test_several_plans_are_measured_in_one_run_and_paired(files, capsys):
    run(
        "calibrate demo --out {f}/denser --config {f}/settings.yaml --text {f}/text.txt --method wina --sparsity 0.3",
        files,
    )
    capsys.readouterr()
    command = "evaluate demo --text {f}/text.txt --window 64 --tokens 256 --plan {f}/plan --plan {f}/denser"
    run(command + " --json", files)
    out = json.loads(capsys.readouterr().out)
    one, other = out["plans"]
    assert [p["name"] for p in out["plans"]] == ["plan", "denser"] and [one["target"], other["target"]] == [0.5, 0.3]
    (pair,) = out["paired"]
    assert (pair["first"], pair["second"]) == ("denser", "plan")
    assert pair["kl"] == pytest.approx(other["kl"] - one["kl"], abs=1e-9) and pair["kl"] < 0
    # The same windows: the error of the difference is less than that of two runs.
    assert 0 < pair["kl_error"] < (one["kl_error"] ** 2 + other["kl_error"] ** 2) ** 0.5
    run(command.replace(" --plan {f}/denser", " --json"), files)
    assert json.loads(capsys.readouterr().out)["kl"] == pytest.approx(one["kl"], rel=1e-6)
    run(command, files)
    words = " ".join(capsys.readouterr().out.split())
    assert f"KL of denser minus plan: {pair['kl']:+.4f} ± {pair['kl_error']:.4f} (paired over windows)" in words


def test_plans_of_one_sparsity_are_compared_at_one_share(files, capsys):
    plan = ws.SparsityPlan.load(files / "plan")
    if not (files / "off").exists():
        dataclasses.replace(plan, method="teal", thresholds=plan.thresholds * 0.8).save(files / "off")
    command = "evaluate demo --text {f}/text.txt --window 64 --tokens 256 --plan {f}/plan --plan {f}/off"
    run(command + " --json", files)
    out = json.loads(capsys.readouterr().out)
    one, off = out["plans"]
    assert one["rival"] == "off" and "rival" not in off  # it says that it is TEAL's
    assert off["sparsity"] < one["sparsity"] - 0.05
    assert one["sparsity_at_rival"] == pytest.approx(off["sparsity"], abs=0.001)
    assert one["kl_at_rival"] == pytest.approx(off["kl"], rel=0.05) and one["kl"] > 1.3 * off["kl"]
    assert one["kl_of_rival"] == pytest.approx(one["kl_at_rival"] / off["kl"])
    (pair,) = out["paired"]
    assert pair["at_share_of"] == "off" and pair["kl"] == pytest.approx(off["kl"] - one["kl_at_rival"], abs=1e-9)
    run(command, files)
    words = " ".join(capsys.readouterr().out.split())
    assert "(paired over windows, at the share that off skips)" in words and "at equal shares" in words
    run(command + " --hold --json", files)  # each holds its own
    out = json.loads(capsys.readouterr().out)
    assert "rival" not in out["plans"][0] and out["paired"][0]["at_share_of"] is None


def test_tables_are_for_people(files, capsys):
    run("evaluate demo --text {f}/text.txt --plan {f}/plan --window 128", files)
    out = capsys.readouterr().out
    assert "wina" in out and "dense" in out and "realised sparsity by layer" in out


@pytest.mark.parametrize(("near", "told"), [(-1.0, True), (1.0, False)])
def test_another_sparsity_than_the_plans_is_told(files, capsys, monkeypatch, near, told):
    from wisparse_jax.commands import evaluate

    monkeypatch.setattr(evaluate, "NEAR", near)
    run("evaluate demo --text {f}/text.txt --plan {f}/plan --window 128", files)
    found = re.search(
        r"wina \(allocator uniform\) skips ([\d.]+)%, not the 50% that it was made for", capsys.readouterr().out
    )
    assert bool(found) == told and (found is None or abs(float(found[1]) - 50) < 10)


def test_a_plan_is_not_scored_on_the_text_that_it_was_calibrated_on(files, capsys, monkeypatch):
    """Sampled text: refused where its seed is asked for, and not taken where none is. A file: told by its name."""
    plan = SparsityPlan.load(files / "plan")
    for seed in (0, 1):
        place = files / f"own-{seed}"
        if not place.exists():
            dataclasses.replace(plan, seed=seed, calibration=plan.calibration | {"text": "self"}).save(place)
    command = "evaluate demo --text self --tokens 128 --window 64 --json --plan {f}/own-0 --plan {f}/own-1"
    with pytest.raises(SystemExit):
        run(f"{command} --seed 1", files)
    assert "seed = 1: samples the text that own-1 was calibrated on: expected another" in capsys.readouterr().err
    seeds = []

    def sample(*arguments, seed, **how):
        seeds.append(seed)
        return sample_windows(*arguments, seed=seed, **how)

    monkeypatch.setattr("wisparse_jax.inference.sample_windows", sample)
    run(command, files)
    run(command + " --seed 7", files)
    run("evaluate demo --text self --tokens 128 --window 64 --json", files)
    assert seeds == [2, 7, 1]
    capsys.readouterr()
    run("evaluate demo --text {f}/text.txt --plan {f}/plan --window 128 --json", files)
    assert "plan was calibrated on a text of the same name" in capsys.readouterr().err


def test_int8_weights_are_measured_against_the_model_as_it_is(files, capsys):
    command = "evaluate demo --text {f}/text.txt --window 128 --weights int8 --json"
    run(command, files)
    dense = json.loads(capsys.readouterr().out)
    run(command + " --plan {f}/plan", files)
    sparse = json.loads(capsys.readouterr().out)
    assert 0 < dense["kl"] < 0.01 < sparse["kl"] and dense["sparsity"] == 0 and dense["weights"] == "int8"
    run(command.replace("--json", "--plan {f}/plan"), files)
    out = capsys.readouterr().out
    assert "dense int8" in out and "realised sparsity by layer" in out


def test_a_byte_order_mark_is_no_token_and_a_plan_may_be_named_by_its_file(files, capsys):
    outputs = []
    for text, plan in (("text", "plan"), ("marked", "plan/plan.json")):
        run(f"evaluate demo --text {{f}}/{text}.txt --plan {{f}}/{plan} --window 64 --tokens 64 --json", files)
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0]["kl"] == outputs[1]["kl"] and outputs[0]["perplexity"] == outputs[1]["perplexity"]


def test_self_text_calibrates_without_data(files, capsys):
    options = "--text self --tokens 64 --sparsity 0.3 --method uniform"
    run(f"calibrate demo --out {{f}}/self --config {{f}}/settings.yaml {options}", files)
    plan = json.loads((files / "self" / "plan.json").read_text())
    assert (
        plan["calibration"]["model"] == "demo"
        and re.fullmatch(r"self \(\d+ openers, [0-9a-f]{8}\)", plan["calibration"]["text"])
        and plan["calibration"]["tokens"] == 64
        and plan["target"] == 0.3
    )


def test_generate_streams_the_same_text_for_the_same_seed(files, capsys):
    texts = []
    for _ in range(2):
        run("generate demo --prompt Harbours --plan {f}/plan --max-new-tokens 12 --temperature 0.9 --seed 5", files)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("Harbours") and len(texts[0]) > 20


def test_what_is_skipped_is_held_and_said(files, capsys):
    command = "generate demo --prompt Harbours --plan {f}/plan --max-new-tokens 120 --temperature 1 --seed 5"
    run(f"{command} --json", files)
    held = json.loads(capsys.readouterr().out)
    run(f"{command} --json --fixed-thresholds", files)
    loose = json.loads(capsys.readouterr().out)
    assert abs(held["sparsity"] - 0.5) < min(0.01, abs(loose["sparsity"] - 0.5))
    run(command, files)
    assert f"tok/s, {held['sparsity']:.1%} skipped; ended by --max-new-tokens\n" in capsys.readouterr().err


def test_convert_makes_a_model_that_commands_accept(files, capsys):
    run("convert demo {f}/converted", files)
    capsys.readouterr()
    texts = []
    for name in ("demo", "{f}/converted"):
        run(f"generate {name} --prompt Seas --plan {{f}}/plan --max-new-tokens 8", files)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


BAD = {
    "no model": ("evaluate {f}/none --text {f}/text.txt", "none"),
    "empty folder": ("evaluate {f}/empty --text {f}/text.txt", "config.json"),
    "no text": ("evaluate demo --text {f}/none.txt", "none.txt: no such file"),
    "binary text": ("evaluate demo --text {f}/binary.txt", "binary.txt: not UTF-8"),
    "short text": ("evaluate demo --text {f}/short.txt", "short.txt: holds .* tokens, too few"),
    "window": ("evaluate demo --text {f}/text.txt --window 1", "window, in tokens = 1: expected 2 or above"),
    "a name too long": (f"evaluate {'x' * 300} --text {{f}}/text.txt", "x': no such folder: expected a model folder"),
    "a path too long": (f"generate /{'x' * 300}/y --prompt x", "y': no such folder: expected a model folder"),
    "a user that there is not": ("generate ~nobody.here/x --prompt x", "'~nobody.here/x': no such folder"),
    "a long name of a plan": (f"generate demo --prompt x --plan {'x' * 300}", "expected a plan folder, found no such"),
    "a long name of settings": (f"calibrate demo --out {{f}}/new --config {'x' * 300}", "x: no such file"),
    "a long name of a text": (f"calibrate demo --out {{f}}/new --text {'x' * 300}", "cannot be read: File name too"),
    "a long name of a GGUF file": (f"convert {'x' * 300}.gguf {{f}}/new", "gguf: cannot be read: File name too long"),
    "binary text of a search": ("calibrate demo --out {f}/new --text {f}/binary.txt", "binary.txt: not UTF-8"),
    "short text of a search": ("calibrate demo --out {f}/new --text {f}/short.txt", "short.txt: holds .* too few"),
    "degenerate text of a search": ("calibrate demo --out {f}/new --text {f}/dull.txt", "the text is degenerate"),
    "no text of a search": ("calibrate demo --out {f}/new --text {f}/none.txt", "none.txt: no such file"),
    "a shape that there is not": ("benchmark llama-9-9b", "llama-9-9b': no such folder or shape: .* llama-3.1-8b"),
    "a folder that nothing can be made in": (
        "calibrate demo --out /proc/new --method uniform",
        "/proc/new: cannot be written: ",
    ),
    "an endless text": ("evaluate demo --text /dev/zero", "error: /dev/zero: a device: expected a file"),
    "endless prompts": ("generate demo --prompts /dev/zero", "error: /dev/zero: a device: expected a file"),
    "sparsities of one folder": (
        "calibrate demo --out {f}/new --sparsity 0.5 0.50000001",
        "expected none twice, in the six digits of a folder's name",
    ),
    "sparsities of one folder in a sweep": (
        "sweep demo --out {f}/new --sparsity 0.5 0.50000001",
        "sparsity = 0.5 0.50000001: expected at least one, and none twice",
    ),
    "a head before text is sampled": (
        "convert demo {f}/new --weights int4 --rounding compensated --text self --head int4",
        "head = 'int4': expected int8",
    ),
    "numbers before text is sampled": (
        "convert demo {f}/new --weights int4 --rounding compensated --text self --dtype float16",
        "dtype = 'float16': expected float32 or bfloat16",
    ),
    "no model of a search": ("calibrate {f}/none --out {f}/new", "none': no such folder"),
    "nothing held out": ("calibrate demo --out {f}/new --max-kl 0.1 --tokens 512", "max-kl needs held-out windows"),
    "two bounds": ("calibrate demo --out {f}/new --max-kl 0.1 --sparsity 0.5", "either --sparsity or --max-kl"),
    "tokens of tasks": ("evaluate demo --tasks arc --tokens 9", "--tokens is for a --text: tasks do not take it"),
    "window of tasks": ("evaluate demo --tasks arc --window 9", "--window is for a --text: tasks do not take it"),
    "seed of tasks": ("evaluate demo --tasks arc --seed 1", "--seed is for a --text: tasks do not take it"),
    "JSON of tasks": ("evaluate demo --tasks arc --json", "--json is for a --text: tasks do not take it"),
    "head": ("evaluate demo --text {f}/text.txt --head int4", "head = 'int4': expected int8"),
    "long window": ("evaluate demo --text {f}/text.txt --window 600", "longer than the model's context of 512"),
    "zero tokens of self": ("evaluate demo --text self --tokens 0", "tokens = 0: expected 1 or above"),
    "percent": ("evaluate demo --text self --sparse-prefill 50", r"sparse-prefill = 50.0: .* \(did you mean 0.5\?\)"),
    "a command misspelled": ("calibrat demo --out {f}/new", "there is no command 'calibrat': did you mean calibrate?"),
    "no such command": ("run demo", "there is no command 'run': expected one of demo, calibrate"),
    "an option twice": ("generate demo --prompt a --seed 1 --prompt=b", "--prompt is given 2 times: expected once"),
    "a plan twice": ("generate demo --prompt a --plan {f}/plan --plan {f}/plan", "--plan is given 2 times"),
    "the same plan twice": (
        "evaluate demo --text {f}/text.txt --plan {f}/plan --plan {f}/plan",
        "plan: named twice",
    ),
    "several plans on tasks": ("evaluate demo --tasks a --plan {f}/plan --plan {f}/empty", "expected at most one with"),
    "plan of another model": ("convert {f}/none {f}/new --plan {f}/none", "none: expected a plan folder"),
    "a type of numbers": ("convert demo {f}/new --dtype float16", "dtype = 'float16': expected float32 or bfloat16"),
    "a method twice": (
        "sweep demo --out {f}/new --methods teal teal",
        "methods = teal teal: expected at least one, and",
    ),
    "a method of a sweep": ("sweep demo --out {f}/new --methods magic", "expected one of wisparse-plus"),
    "a sweep over a folder": ("sweep demo --out {f}/empty", "empty: exists already"),
    "one text for both": (
        "sweep demo --out {f}/new --text {f}/text.txt --evaluate {f}/text.txt",
        "expected another text to measure on than to calibrate on",
    ),
    "no text of a sweep": ("sweep demo --out {f}/new --evaluate {f}/none.txt", "none.txt: no such file"),
    "an option twice, spelled otherwise": ("generate demo --top-k 3 --top_k 4 --prompt a", "--top-k is given 2 times"),
    "negative seed of a search": (
        "calibrate demo --out {f}/new --seed -1",
        "seed = -1: expected a whole number from 0",
    ),
    "negative seed": ("generate demo --prompt x --seed -1", "seed = -1: expected a whole number from 0 to"),
    "large seed": (f"evaluate demo --text self --seed {2**63}", "seed = 9223372036854775808: expected a whole number"),
    "nucleus in percent": ("generate demo --prompt x --top-p 90", r"top-p = 90.0: .* \(did you mean 0.9\?\)"),
    "zero tokens": ("evaluate demo --text {f}/text.txt --tokens 0", "tokens = 0: expected 1 or above"),
    "share": ("evaluate demo --text {f}/text.txt --sparse-prefill 2", "sparse-prefill = 2.0"),
    "no plan": ("evaluate demo --text {f}/text.txt --plan {f}/none", "none: expected a plan folder"),
    "not a plan": ("generate demo --prompt x --plan {f}/empty", "no plan.json in it"),
    "method": (
        "calibrate demo --out {f}/new --method magic",
        "expected one of wisparse-plus, planes, grinqh, wisparse, wisparse-paper, teal",
    ),
    "sparsity": ("calibrate demo --out {f}/new --sparsity 1.5", "sparsity = 1.5"),
    "settings": ("calibrate demo --out {f}/new --config {f}/bad.yaml", "bad.yaml: unknown field 'tokenz'"),
    "no settings": ("calibrate demo --out {f}/new --config {f}/none.yaml", "none.yaml: no such file"),
    "plan exists": ("calibrate demo --out {f}/plan", "plan: exists already"),
    "no budget": ("calibrate demo --out {f}/new --tokens 0", "tokens = 0"),
    "temperature": ("generate demo --prompt x --temperature -1", "temperature = -1.0"),
    "top-k": ("generate demo --prompt x --top-k 0", "top-k = 0"),
    "long answer": ("generate demo --prompt x --max-new-tokens 600", "exceeds the context of 512"),
    "weights": ("generate demo --prompt x --weights int2", "weights = 'int2'"),
    "implementation": ("generate demo --prompt x --implementation cuda", "implementation = 'cuda'"),
    "no thresholds": ("generate demo --prompt x --implementation triton", "implementation = 'triton'"),
    "convert over": ("convert demo {f}/empty", "empty"),
    "rounding without a text": (
        "convert demo {f}/new --weights int4 --rounding compensated",
        "rounding = 'compensated': expected --text FILE",
    ),
    "rounding of int8": (
        "convert demo {f}/new --weights int8 --rounding compensated --text self",
        "rounding = 'compensated': expected --weights int4, found int8",
    ),
    "a text without its rounding": (
        "convert demo {f}/new --weights int4 --text self",
        "text: expected with --rounding",
    ),
    "demo over": ("demo --out {f}/empty", "exists already"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(files, capsys, monkeypatch, name):
    command, message = BAD[name]
    # What generate reads meanwhile is not waited for.
    monkeypatch.setattr("wisparse_jax.models.loading.read_params", lambda *_: pytest.fail("read the weights"))
    before = sorted(files.iterdir())
    with pytest.raises(SystemExit) as caught:
        run(command, files)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("wisparse: error: ") and re.search(message, line)
    assert captured.out == "" and sorted(files.iterdir()) == before and not list((files / "empty").iterdir())


def test_an_unknown_argument_exits_with_2():
    run = subprocess.run(
        [sys.executable, "-m", "wisparse_jax", "calibrate", "demo", "--sparsity", "half", "--out", "x"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "sparsity" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1024 bytes.",
        "INTERNAL: no context for device 0\nfailed call to cuInit: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    ],
)
def test_a_full_device_is_one_line(files, capsys, monkeypatch, said):
    def load(*_, **__):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr("wisparse_jax.models.loading.load", load)
    with pytest.raises(SystemExit) as caught:
        main(["generate", "demo", "--prompt", "x"])
    line = f"wisparse: error: out of memory (does another process hold the device's?): {said.splitlines()[0]}\n"
    assert caught.value.code == 2 and capsys.readouterr().err == line


def test_an_interruption_is_one_line(files, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("wisparse_jax.models.loading.load", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["generate", "demo", "--prompt", "x"])
    assert caught.value.code == 130 and capsys.readouterr().err == "wisparse: interrupted\n"


def test_a_search_says_how_long_it_will_take_unless_it_goes_on(files, capsys, monkeypatch):
    write_tiny_folder(files / "timed")
    forecast = Mock(return_value="about a year")
    monkeypatch.setattr("wisparse_jax.search.cost.forecast", forecast)
    monkeypatch.setattr("wisparse_jax.search.calibrate_targets", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("wisparse_jax.search.calibrate_to_kl", Mock(side_effect=KeyboardInterrupt))
    command = "calibrate {f}/timed --out {f}/long --config {f}/settings.yaml --method teal"
    asked = []
    for options in (
        "--tokens 256 --sparsity 0.3 0.5", "--text {f}/text.txt --tokens 500 --sparsity 0.5", "--tokens 512 --max-kl 1"
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run(f"{command} {options}", files)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "about a year" + ", more for the sparsities that are tried" * ("--max-kl" in options)
        _, methods, settings, targets, sampled = forecast.call_args.args
        asked.append(([method.name for method in methods], settings.tokens, targets, sampled))
    named = ["teal (allocator uniform)"]  # as the settings switch it
    assert asked == [(named, 256, 2, 256), (named, 512, 1, 0), (named, 512, 1, 512)]
    state = files / ".long.search"
    state.mkdir()  # of a search that was stopped before it had found anything
    for kept, asks in ((False, 4), (True, 4)):
        (state / "basis").mkdir() if kept else (state / "identity.json").touch()
        with pytest.raises(SystemExit):
            run(f"{command} --tokens 256", files)
        assert ("a year" in capsys.readouterr().err) != kept and forecast.call_count == asks
    shutil.rmtree(state)


def test_a_search_that_ends_early_says_that_the_same_command_goes_on(files, capsys, monkeypatch):
    """Three times, each from what the first has kept."""
    write_tiny_folder(files / "tiny")
    state = files / ".early.search"
    command = "calibrate {f}/tiny --out {f}/early --config {f}/settings.yaml --text {f}/text.txt"
    for error, code, words in (
        (KeyboardInterrupt, 130, "wisparse: interrupted"),
        (MemoryError, 2, "wisparse: error: out of memory"),
        (ZeroDivisionError, 1, "wisparse: this is a defect"),
    ):
        monkeypatch.setattr("wisparse_jax.search.stages.thresholds.sparse_thresholds", Mock(side_effect=error))
        with pytest.raises(SystemExit) as caught:
            run(command, files)
        line = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == code and words in line
        assert line.endswith(f"; the same command goes on from what is kept in {state}") and state.is_dir()
    with pytest.raises(SystemExit):
        run("generate demo --prompt x --seed -1", files)
    assert "goes on" not in capsys.readouterr().err
    shutil.rmtree(state)


@pytest.mark.parametrize(
    ("saved", "method"),
    [(0, "wisparse-plus"), (1, "wisparse-plus"), (1, "uniform"), (2, "wisparse-plus")],
)
def test_what_was_found_is_kept_until_every_plan_is_saved(files, tmp_path, monkeypatch, saved, method):
    """Ended before a plan is written, between two, and before what was kept is removed."""
    write_tiny_folder(tmp_path / "tiny")
    (tmp_path / "settings.yaml").write_text(
        SETTINGS.replace("window: 64", "window: 60").replace("allocator: uniform\n", "")
    )
    command = f"calibrate {tmp_path}/tiny --config {tmp_path}/settings.yaml --text {{f}}/text.txt --sparsity 0.3 0.5"
    command += f" --method {method} --out "
    run(f"{command}{tmp_path}/whole", files)
    save, calls = ws.SparsityPlan.save, itertools.count()

    def end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ws.SparsityPlan, "save", lambda *args: end() if next(calls) == saved else save(*args))
        if saved == 2:
            patch.setattr("wisparse_jax.search.state.remove_state", end)
        with pytest.raises(SystemExit):
            run(f"{command}{tmp_path}/plan", files)
    assert (tmp_path / ".plan.search").is_dir()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("plan-*/plan.json")}
    assert len(written) == saved
    run(f"{command}{tmp_path}/plan", files)
    assert {path: path.stat().st_mtime_ns for path in written} == written and not (tmp_path / ".plan.search").exists()
    for sparsity in (0.3, 0.5):
        plan, whole = (ws.SparsityPlan.load(tmp_path / f"{name}-{sparsity}") for name in ("plan", "whole"))
        assert plan.has_numbers_of(whole)
    assert not plan.has_numbers_of(ws.SparsityPlan.load(tmp_path / "plan-0.3"))
    (tmp_path / ".plan.search.removed").mkdir()
    with pytest.raises(SystemExit):  # there is nothing to go on with any more
        run(f"{command}{tmp_path}/plan", files)
    assert not list(tmp_path.glob(".plan*"))


def test_a_plan_that_cannot_be_written_where_it_was_wanted_is_written_elsewhere(files, tmp_path, capsys, monkeypatch):
    """Its place became a file's while the search ran."""
    from wisparse_jax.commands.calibrate import _save
    from wisparse_jax.sparsity import SparsityPlan

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = SparsityPlan.load(files / "plan")
    (tmp_path / "file").write_text("")
    rescued = _save(plan, tmp_path / "file" / "out")
    assert rescued.name == "out" and rescued.parent.parent == tmp_path
    assert SparsityPlan.load(rescued).fingerprint == plan.fingerprint
    err = capsys.readouterr().err
    assert err.startswith(f"wisparse: {tmp_path}/file/out: cannot be written") and err.count("\n") == 1
    assert err.endswith(f"; the plan was written to {rescued} instead\n")
    assert _save(plan, tmp_path / "right") == tmp_path / "right" and capsys.readouterr().err == ""


def test_help_needs_no_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    main(["lm-eval", "--help"])
    out = capsys.readouterr().out
    assert "wisparse lm-eval --model_args" in out and "pip install 'wisparse-jax[eval]'" in out
