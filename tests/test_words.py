"""The words of a command line: lists, numbers and paths, however they are written."""

import os
from pathlib import Path
from typing import Any

import pytest
import tyro

from wisparse_jax import cli
from wisparse_jax.cli import COMMANDS, main
from wisparse_jax.commands.lists import listed, lists_of
from wisparse_jax.commands.options import REGISTRY, STYLE
from wisparse_jax.errors import WisparseError
from wisparse_jax.files import expanded


def parsed(words) -> Any:
    given = cli._with_lists(words.split())
    return tyro.cli(cli.Program, args=given, prog="wisparse", config=STYLE, registry=REGISTRY).command


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("evaluate demo --text a --plan A B", "plan", ("A", "B")),
        ("evaluate demo --plan A B --text a", "plan", ("A", "B")),
        ("evaluate demo --plan A --text a --plan=B", "plan", ("A", "B")),
        ("evaluate --plan A --plan B demo --text a", "plan", ("A", "B")),
        ("--compilation-cache off evaluate demo --plan A B --text a", "plan", ("A", "B")),
        ("generate demo --stop a b --prompt x --stop=-5 --stop=--", "stop", ("a", "b", "-5", "--")),
        ("calibrate demo --sparsity 0.3 --out o --sparsity 0.5", "sparsity", (0.3, 0.5)),
        ("calibrate demo --sparsity 0.3 0.5 --out o", "sparsity", (0.3, 0.5)),
        ("sweep demo --out o --methods teal --methods wina uniform", "methods", ("teal", "wina", "uniform")),
        ("benchmark demo --weights int8 --weights int4 --batch 1 2", "weights", ("int8", "int4")),
    ],
)
def test_a_list_is_a_list_in_every_command(words, field, value):
    assert getattr(parsed(words), field) == value


def test_the_lists_are_those_of_the_commands():
    found = {(name, option) for name, command in COMMANDS.items() for option in lists_of(command)}
    assert {("evaluate", "--plan"), ("generate", "--stop"), ("sweep", "--methods"), ("benchmark", "--head")} <= found
    assert not any(name in ("report", "lm-eval") for name, _ in found)


@pytest.mark.parametrize("words", ["demo --sparsity --out o", "demo --out o --sparsity 0.5 --sparsity"])
def test_a_list_without_a_value_is_refused(words):
    with pytest.raises(WisparseError, match="--sparsity: expected a value, found none"):
        listed(COMMANDS["calibrate"], words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("calibrate demo --out o --sparsity 40%", "--sparsity 40%: expected a number (did you mean 0.4?)"),
        ("calibrate demo --out o --sparsity 0.3 half", "--sparsity half: expected a number"),
        ("calibrate demo --out o --max-kl=5%", "--max-kl 5%: expected a number (did you mean 0.05?)"),
        ("generate demo --prompt 5% --top-p 90%", "--top-p 90%: expected a number (did you mean 0.9?)"),
    ],
)
def test_a_percentage_gets_a_hint(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2 and capsys.readouterr().err == f"wisparse: error: {said}\n"


def test_zero_has_no_sign():
    assert [str(x) for x in parsed("calibrate demo --out o --sparsity -0.0 0.3").sparsity] == ["0.0", "0.3"]


def test_the_home_folder_is_meant_wherever_a_path_is_taken(tmp_path, monkeypatch, capsys, files):
    home = files
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert expanded("~/a") == home / "a" and expanded("~nobody.here/a") == Path("~nobody.here/a")
    assert expanded("./~/a") == Path("~/a") and expanded("a~") == Path("a~")
    main(["calibrate", "demo", "--out=~/plans/p", "--method=uniform", "--text=~/text.txt", "--config=~/settings.yaml"])
    assert (home / "plans" / "p" / "plan.json").is_file()
    main(["evaluate", "demo", "--text=~/text.txt", "--tokens", "64", "--window", "64", "--plan=~/plans/p", "--json"])
    main(["generate", "demo", "--prompts=~/text.txt", "--max-new-tokens", "1", "--plan=~/plans/p", "--json"])
    main(["report", "~/plans/p", "--out=~/page"])
    main(["convert", "demo", "~/converted", "--plan=~/plans/p"])
    main(["generate", "~/converted", "--prompt", "a", "--max-new-tokens", "1"])
    assert (home / "page" / "index.html").is_file() and os.listdir(tmp_path) == []


@pytest.fixture
def files(tmp_path_factory):
    """A home folder with a text and settings that take seconds."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text("The harbour was quiet when the boats came home, and a boy counted them. " * 20)
    (home / "settings.yaml").write_text("window: 64\ntokens: 128\nstatistics_tokens: 64\ncompare_teal: false\n")
    return home
