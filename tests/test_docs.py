"""The pages name commands, options, files and links that exist."""

import re

import pytest

from wisparse_jax import cli


@pytest.fixture(scope="module")
def pages(repository):
    files = [repository / "README.md", repository / "CONTRIBUTING.md", *sorted((repository / "docs").rglob("*.md"))]
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


def spans(text):
    """What a page shows as code: inside lines, and in blocks of its own, whose lines may go on behind a backslash."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [" ".join(code.split()) for code in inline] + [block.replace("\\\n", " ") for block in blocks]


@pytest.fixture(scope="module")
def source(repository):
    folders = ("wisparse_jax", "kernels_pallas", "scripts", "examples", "tests")
    files = [file for folder in folders for file in (repository / folder).rglob("*.py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in [*files, repository / "pyproject.toml"])


def test_names_in_code_exist(pages, source):
    """Constants, functions, fields and dotted names, but for what has gone and is said to have."""
    others = {"strftime_now", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
    words, checked = set(re.findall(r"\w+", source)) | others, 0
    for file, text in pages.items():
        gone = set(re.findall(r"`(\w+)\.py`[^`]{1,60}removed\s+after\s+commit", text))
        for code in spans(text):
            names = set(re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", code))
            if name := re.fullmatch(r"(\w+(?:\.\w+)*)(?:\(.*\))?", code):
                names |= {part for part in name[1].split(".") if "_" in part}
            checked += len(names)
            assert names - words - gone == set(), f"{file.name}: {code}"
    assert checked > 60


def test_options_of_scripts_that_are_shown_exist(pages, repository):
    """A field of the script's arguments, or of the command's that it stands for."""
    shown = {}
    for text in pages.values():
        for line in "\n".join(spans(text)).splitlines():
            for script, rest in re.findall(r"python scripts/(\w+)\.py([^#]*)", line):
                shown.setdefault(script, set()).update(re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", rest))
    assert len(shown) >= 8
    for script, options in shown.items():
        text = (repository / "scripts" / f"{script}.py").read_text(encoding="utf-8")
        for module in re.findall(r"from (wisparse_jax\.commands\.\w+|wisparse_jax\.benchmark\.decode) import", text):
            text += (repository / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        for option in options:
            assert f'"--{option}"' in text or f"    {option.replace('-', '_')}: " in text, f"{script}: --{option}"


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
