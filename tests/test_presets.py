"""Search settings by name."""

import tomllib

import pytest

import wisparse_jax as ws
from wisparse_jax.cli import main
from wisparse_jax.presets import description, fitting_preset, presets, settings_file
from wisparse_jax.search import SearchSettings, read_settings
from wisparse_jax.search.cost import Speed


def test_the_presets_are_the_files_at_the_top(repository):
    found = presets()
    assert list(found) == ["quick", "default", "thorough", "paper"]
    for name, file in found.items():
        assert file.samefile(repository / "configs" / f"{name}.yaml")
        assert ws.preset(name) == read_settings(repository / "configs" / f"{name}.yaml")
    assert read_settings(settings_file("default")) == SearchSettings() == read_settings(settings_file(None))
    assert read_settings(settings_file("paper")).generations == 400


def test_a_path_stays_a_path(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("# Mine.\n# And yours.\ntokens: 4096\n")
    assert settings_file(tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    assert description(tmp_path / "mine.yaml") == "Mine. And yours."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").write_text("tokens: 2048")
    assert read_settings(settings_file("quick")).tokens == 8192  # the name
    assert read_settings(settings_file("./quick")).tokens == 2048


def test_the_command_lists_them(capsys):
    main(["presets"])
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")] == [
        "quick",
        "default",
        "thorough",
        "paper",
    ]
    assert "8,192 tokens of text. wisparse-plus: 275 steps of the basis, gradients of 2,048 tokens" in out
    assert "wisparse: 256 candidates on 512 tokens each." in out


def test_the_command_says_what_each_costs_for_a_model(capsys, monkeypatch):
    monkeypatch.setattr("wisparse_jax.search.cost.measured_speed", lambda model: Speed(0.001, 1.0))
    main(["presets", "demo", "--method", "teal"])
    out = capsys.readouterr().out
    assert out.startswith("quick (the default here, on a CPU): ")
    assert "teal, one sparsity: up to 270 thousand tokens forwarded, 92% of them for budgets; roughly 9 minutes" in out
    assert out.count("tokens forwarded") == 4 and "roughly 2 days here" in out


def test_the_preset_fits_the_model_and_the_device(repository, monkeypatch, tmp_path, capsys):
    from wisparse_jax.models.config import read_config

    small, large = (read_config(repository / "configs" / f"llama-3.{name}.json") for name in ("2-1b", "1-8b"))
    assert fitting_preset(large) == ("quick", "on a CPU")
    with pytest.raises(SystemExit):  # refused after the choice, which was said
        main(["calibrate", "demo", "--sparsity", "50", "--out", str(tmp_path / "plan")])
    assert capsys.readouterr().err.startswith("settings: quick, on a CPU; --config takes others\n")
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert fitting_preset(small) == ("thorough", "for 973 million weights on a GPU or TPU")
    assert fitting_preset(large) == ("default", "for 7.0 billion weights")


def test_an_unknown_name_is_a_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["calibrate", "demo", "--config", "quik", "--out", str(tmp_path / "plan")])
    assert "quik: no such file; expected a file or one of quick, default, thorough, paper" in capsys.readouterr().err


def test_a_wheel_holds_them(repository):
    """Through the link in the package: a wheel holds the files that package data name."""
    data = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    held = {file for pattern in data["wisparse_jax"] for file in (repository / "wisparse_jax").glob(pattern)}
    assert {repository / "wisparse_jax" / "configs" / f"{name}.yaml" for name in presets()} <= held
