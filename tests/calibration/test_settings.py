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
    "search_exponents: 1": "search_exponents = 1: expected true or false",
    "held_out_share: -0.1": "held_out_share = -0.1: expected a positive number",
    "training_steps: -1": "training_steps = -1: expected a positive number",
    "basis: pca": "basis = 'pca': expected one of method, none, eigen, refined",
    "allocator: magic": "allocator = 'magic': expected one of method, uniform",
    "window: 1": "window = 1: expected at least 2 tokens",
    "algorithm: GradientDescent": "algorithm = 'GradientDescent': expected one of CR_FM_NES",
    "- 1": "expected an object, found [1]",
    "exponent_step: 0.000000001": "exponent_step = 1e-09: expected a number from 0.001 on",
    "layer_step: 1.0e-14": "layer_step = 1e-14: expected a number from 0.0001 on",
    "population: 10000000": "population = 10000000: expected a number up to 16384",
    "tokens: 1000000000000000000": "tokens = 1000000000000000000: expected a number up to 100000000",
    "block_tokens: 1000000000": "block_tokens = 1000000000: expected a number up to 100000000",
    "initial_std: 1.0e+39": "initial_std = 1e+39: expected a share, at most 1",
    "max_exponent: 1.0e+9": "max_exponent = 1000000000.0: expected a number up to 16",
    "bias_rate: 2": "bias_rate = 2.0: expected a number up to 1",
    "basis_rate: 1.0e+300": "basis_rate = 1e+300: expected a number up to 1",
    "generations: 1000000000": "generations = 1000000000: expected a number up to 100000",
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


BOUNDS = {  # the least and the largest that are accepted, and a step beyond
    "window": (2, 2**24, 1),
    "tokens": (1, 10**8, 1),
    "sparse_share": (1e-9, 1.0, 1e-9),
    "held_out_share": (0.0, 1.0, 1e-9),
    "max_sparsity": (1e-9, 1.0, 1e-9),
    "basis_sparsity": (1e-9, 1.0, 1e-9),
    "chunk": (1, 2**14, 1),
    "absolute_steps": (0, 10**6, 1),
    "skipped_steps": (0, 10**6, 1),
    "heads_steps": (0, 10**6, 1),
    "training_steps": (0, 10**6, 1),
    "training_every": (1, 10**6, 1),
    "basis_rate": (1e-9, 1.0, 1e-9),
    "bias_rate": (1e-9, 1.0, 1e-9),
    "gain_rate": (1e-9, 1.0, 1e-9),
    "exponent_step": (1e-3, 10.0, 1e-9),
    "max_exponent": (1e-9, 16.0, 1e-9),
    "exponent_passes": (1, 10**5, 1),
    "population": (4, 2**14, 2),
    "generations": (1, 10**5, 1),
    "initial_std": (1e-9, 1.0, 1e-9),
    "paper_generations": (1, 10**5, 1),
    "paper_offspring": (1, 2**14, 1),
    "layer_step": (1e-4, 1.0, 1e-9),
    "block_tokens": (1, 10**8, 1),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_every_number_has_its_bounds(name):
    least, largest, step = BOUNDS[name]
    for value in (least, largest):
        assert getattr(SearchSettings(**{name: value}), name) == value
    refused = [least - step] if name == "exponent_step" else [least - step, largest + step]
    for value in refused:
        with pytest.raises(ConfigError, match=f"^{name} = "):
            SearchSettings(**{name: value})


def test_a_grid_of_exponents_ends_at_or_below_its_largest():
    assert SearchSettings(max_exponent=0.96, exponent_step=0.5).exponents == (0.0, 0.5)
    assert SearchSettings(max_exponent=0.3, exponent_step=0.1).exponents == (0.0, 0.1, 0.2, 0.3)
    assert SearchSettings(max_exponent=0.1, exponent_step=0.2).exponents == (0.0,)


def test_at_least_one_position_is_sparse():
    assert [SearchSettings(sparse_share=share).sparse_positions(512) for share in (1e-6, 0.25, 1.0)] == [1, 128, 512]
