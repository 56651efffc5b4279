import dataclasses

import pytest

from wisparse_jax.errors import ConfigError
from wisparse_jax.search import SearchSettings, read_settings


def test_no_file_gives_the_defaults():
    assert read_settings(None) == SearchSettings()


def test_a_file_changes_what_it_names(tmp_path):
    (tmp_path / "s.yaml").write_text("population: 8\nsparse_share: 1\n")
    settings = read_settings(tmp_path / "s.yaml")
    assert settings == dataclasses.replace(SearchSettings(), population=8, sparse_share=1.0)


@pytest.mark.parametrize("name", ["default", "quick", "paper"])
def test_the_shipped_configurations_are_valid(name, repository):
    settings = read_settings(repository / "configs" / f"{name}.yaml")
    if name == "default":
        assert settings == SearchSettings()


def test_exponents_cover_the_papers_grid():
    grid = SearchSettings().exponents
    assert len(grid) == 31 and grid[0] == 0 and grid[1] == 0.05 and grid[-1] == 1.5


BAD = {
    "populaton: 8": "unknown field 'populaton'",
    "population: many": "population = 'many': expected a whole number",
    "population: 7": "population = 7: expected an even number",
    "tokens: -1": "tokens = -1: expected a positive number",
    "sparse_share: 1.5": "sparse_share = 1.5: expected a share",
    "layer_step: .nan": "layer_step = nan: expected a positive number",
    "search_blocks: 1": "search_blocks = 1: expected true or false",
    "algorithm: GradientDescent": "algorithm = 'GradientDescent': expected one of CR_FM_NES",
    "- 1": "expected an object, found [1]",
    "a: [": "not readable as YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_settings_name_file_and_field(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    assert str(path) in str(caught.value) and BAD[text] in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_settings(tmp_path / "none.yaml")
