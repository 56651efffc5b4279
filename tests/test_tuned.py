"""The files of tuned values hold what the kernels run."""

import json
from importlib import resources

import pytest

from kernels_pallas.fused_block import FusedConfig, FusedShape
from kernels_pallas.fused_block.config import config_for as fused_config_for
from kernels_pallas.fused_block.config import heuristic as fused_heuristic
from kernels_pallas.fused_block.config import problem, search_space, shape_key
from kernels_pallas.kept import LARGEST_BATCH as MOST
from kernels_pallas.sparse_product import Config, config_for
from kernels_pallas.sparse_product.config import valid
from kernels_pallas.tuned import LARGEST_BATCH, largest_batch, tuned, tuned_file

FOLDER = resources.files("kernels_pallas") / "tuned"
FILES = [f for f in FOLDER.iterdir() if f.name.endswith(".json") and f.name != LARGEST_BATCH]
SHAPE = FusedShape(4096, 14336, 32, 8, 128, "bfloat16", 1e-5, (), False)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_values_are_ones_that_run(file):
    found = json.loads(file.read_text())
    assert found["triton"] and tuned_file(found["device"]) == file.name
    for key, fields in found["triton"].items():
        shape, _, batch, kind = key.split()
        assert valid(Config(**fields), int(batch), kind)
        size_in, sizes = shape.split("x")
        sizes = tuple(int(n) for n in sizes.split("+"))
        assert config_for(int(size_in), sizes, int(batch), kind, found["device"]) == Config(**fields)
    for fields in found["mosaic"].values():
        FusedConfig(**fields)


def test_a_device_without_values_gets_the_heuristics():
    assert tuned("a device without tuned values", "mosaic") == {}
    assert fused_config_for(SHAPE, 132, 640, "a device without tuned values") == fused_heuristic(SHAPE, 132, 640)
    assert shape_key(SHAPE) == "4096-14336 heads 32-8-128 bfloat16"


def test_the_search_space_of_the_fused_block_holds_what_runs():
    configs = list(search_space(SHAPE, 132))
    assert len(configs) > 50 and len(set(configs)) == len(configs)
    assert all(problem(SHAPE, c, 1, "bfloat16") is None for c in configs)


def test_the_largest_batches_are_ones_that_run():
    found = json.loads((FOLDER / LARGEST_BATCH).read_text())
    assert found
    for device, batches in found.items():
        assert set(batches) == {"mosaic", "triton"} and batches["mosaic"] == 1
        assert 1 <= batches["triton"] <= MOST
        assert {how: largest_batch(how, device) for how in batches} == batches
    assert largest_batch("triton", "a device that was never measured") == 1
