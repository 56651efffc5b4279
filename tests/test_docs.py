"""The pages name commands, options, files and links that exist."""

import re

import pytest

from wisparse_jax import cli


@pytest.fixture(scope="module")
def pages(repository):
    files = [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]
    return {file: file.read_text(encoding="utf-8") for file in files}


def test_links_lead_somewhere(pages):
    for file, text in pages.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"
        for picture in re.findall(r'(?:src|srcset)="([^"]+)"', text):
            assert (file.parent / picture).exists(), f"{file.name}: {picture}"


def test_files_that_are_named_exist(pages, repository):
    pattern = r"`((?:kernels_pallas|wisparse_jax|scripts|tests|configs|examples)/[\w./-]*)`"
    named = {(file.name, path) for file, text in pages.items() for path in re.findall(pattern, text)}
    named |= {
        (file.name, f"wisparse_jax/{path}")
        for file, text in pages.items()
        for path in re.findall(r"`(models/\w+\.py)`", text)
    }
    assert len(named) > 10
    assert [where for where in named if not (repository / where[1]).exists()] == []


def test_commands_that_are_shown_exist(pages, capsys):
    shown = {}
    for text in pages.values():
        for line in re.findall(r"^(?:wisparse) ([a-z][a-z-]*) ?(.*)$", text, re.MULTILINE):
            shown.setdefault(line[0], set()).update(re.findall(r"--[a-z][\w-]*", line[1].split("#")[0]))
    assert set(shown) <= set(cli.NAMES) and len(shown) >= 8
    for command, options in shown.items():
        if command == "lm-eval":  # its options are the harness's
            continue
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known = capsys.readouterr().out
        assert [option for option in options if option not in known] == [], command


def test_tests_that_are_named_exist(pages, repository):
    named = {match for text in pages.values() for match in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)}
    assert len(named) > 50
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (repository / file).read_text()]
    assert missing == []
