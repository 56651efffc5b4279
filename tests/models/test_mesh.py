"""Several devices: what a mesh may be, and that it computes what one device does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import wisparse_jax as ws
from wisparse_jax.models.config import read_config
from wisparse_jax.models.mesh import make_mesh, param_specs
from wisparse_jax.models.parameters import flat, param_shapes
from wisparse_jax.models.quantise import quantise_params
from wisparse_jax.testing import tiny_config, write_tiny_folder


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=2,model=4", "data=2,model=4: expected sizes whose product is the number of devices, 1, found 8"),
        ("model=0", "model = 0: expected a whole number, 1 or above"),
        ("data=1,tensor=1", "unknown axis 'tensor': expected data and model, such as data=2,model=4"),
        ("model", "mesh = 'model': expected axes and sizes such as data=2,model=4, found 'model'"),
        ("model=1,model=1", "axis 'model' is given twice"),
        ({"model": -1}, "mesh: model = -1: expected a whole number"),
    ],
)
def test_a_mesh_that_cannot_be(mesh, message):
    with pytest.raises(ws.WisparseError) as raised:
        make_mesh(mesh)
    assert message in str(raised.value)


def test_a_mesh_of_one_device():
    assert dict(make_mesh("model=1").shape) == {"data": 1, "model": 1}
    given = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    assert make_mesh(given).axis_names == ("data", "model")
    with pytest.raises(ws.WisparseError, match="unknown axis 'x'"):
        make_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)))


def test_how_weights_are_split(repository):
    """Heads, features and the vocabulary in parts, norms whole; scales as the columns that they belong to."""
    config = read_config(repository / "configs/qwen3-8b.json")
    specs = flat(param_specs(config, param_shapes(config), 2))
    shown = {path.replace("blocks.35.", ""): tuple(spec) for path, spec in specs.items() if "blocks.0." not in path}
    rows, columns = ("model", None), (None, "model")
    assert {shown[name] for name in ("embed", "o.kernel", "down.kernel")} == {rows}
    assert {shown[name] for name in ("lm_head", "q.kernel", "k.kernel", "v.kernel", "gate.kernel")} == {columns}
    assert {shown[name] for name in ("norm", "attn_norm", "mlp_norm", "q_norm", "k_norm")} == {(None,)}
    for kind, ends in (("int8", {"q": ("model",), "o": (None,)}), ("int4", {"q": rows, "o": columns})):
        rounded = jax.eval_shape(lambda p, kind=kind: quantise_params(p, kind, "int8"), param_shapes(config))
        specs = flat(param_specs(config, rounded, 2))
        assert {name: tuple(specs[f"blocks.0.{name}.scale"]) for name in ("q", "o")} == ends
        assert tuple(specs["lm_head.kernel"]) == columns and tuple(specs["lm_head.scale"]) == ("model",)
    odd = tiny_config(vocab_size=97)  # cannot be split in two
    assert tuple(param_specs(odd, param_shapes(odd), 2)["embed"]) == (None, None)


def environment(repository, devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository)}


def test_eight_devices_compute_what_one_does(repository, tmp_path):
    """Logits to 1e-5 of the largest, the same tokens, and the same plan, its thresholds to 1e-4."""
    write_tiny_folder(tmp_path / "model")
    command = [sys.executable, str(repository / "tests/models/mesh_program.py"), str(tmp_path / "model"), "wisparse"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(repository, 8), cwd=repository)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "the same"


PROCESS = """
import sys
import numpy as np
from wisparse_jax.processes import join, part
folder, port, number, out = sys.argv[1:]
join(f"localhost:{port}", 2, int(number))
import jax
jax.config.update("jax_disable_most_optimizations", True)
import wisparse_jax as ws
from wisparse_jax.models.mesh import on_host
assert jax.device_count() == 2 and jax.local_device_count() == 1
model = ws.load(folder, mesh="model=2")
assert not model.params["embed"].is_fully_addressable
logits = on_host(model(np.arange(24).reshape(2, 12)))
ids = ws.generate(model, [[3, 5, 7]], 6)
np.savez(f"{out}-{number}.npz", logits=logits, ids=ids)
part()
"""


def test_two_processes_compute_what_one_does(repository, tmp_path):
    """Each with one device and half of the weights, joined by `jax.distributed`."""
    write_tiny_folder(tmp_path / "model")
    model = ws.load(tmp_path / "model")
    expected, ids = np.asarray(model(np.arange(24).reshape(2, 12))), ws.generate(model, [[3, 5, 7]], 6)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "model"), str(port)]
    both = [
        subprocess.Popen(
            [*command, number, str(out)], env=environment(repository, 1), cwd=repository, stderr=subprocess.PIPE
        )
        for number in "01"
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], b"\n".join(errors).decode()
    for number in "01":
        with np.load(f"{out}-{number}.npz") as found:
            assert np.abs(found["logits"] - expected).max() < 1e-5 * np.abs(expected).max()
            np.testing.assert_array_equal(found["ids"], ids)


def test_the_command_line_refuses_before_it_loads(tmp_path: Path, capsys):
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    from wisparse_jax.cli import outcome

    def line(*words: str) -> str:
        code, said = outcome(["generate", str(tmp_path / "model"), "--prompt", "a", *words])
        assert code == 2 and said is not None
        return said

    assert "product is the number of devices, 1, found 2" in line("--mesh", "model=2")
    assert "'mosaic' runs whole blocks in one launch, which a mesh cannot split" in line(
        "--mesh", "model=1", "--implementation", "mosaic"
    )
    assert "mesh: expected --mesh" in line("--coordinator", "a:1", "--processes", "2", "--process", "0")
    assert "processes: expected --coordinator, --processes and --process together" in line("--coordinator", "a:1")
