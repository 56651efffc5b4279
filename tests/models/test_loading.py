"""Every form of MODEL, the tokenizer, and the end-of-sequence ids."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoint

from wisparse_jax.errors import ConfigError, WeightsError, WisparseError
from wisparse_jax.models import hub
from wisparse_jax.models.checkpoint import convert
from wisparse_jax.models.loading import load, load_tokenizer, read_model_config
from wisparse_jax.models.parameters import flat, param_shapes
from wisparse_jax.testing.tokenizers import NAMED, write


def test_the_tokenizer_survives_conversion(folder: Path, tmp_path: Path) -> None:
    write(folder, "byte level", "<s> $A", NAMED, family=None)
    convert(folder, tmp_path / "out")
    text = "Two words"
    assert load_tokenizer(tmp_path / "out").encode(text) == load_tokenizer(folder).encode(text)


def test_templates_survive_conversion(folder: Path, tmp_path: Path) -> None:
    write(folder, "byte level", "<s> $A", NAMED, family=None)
    more = folder / "additional_chat_templates"
    more.mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (more / "tool_use.jinja").write_text("{{ tools }}")
    convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    templates = load_tokenizer(tmp_path / "out").inner.chat_template
    assert templates == load_tokenizer(folder).inner.chat_template and "{{ tools }}" in str(templates)
    load(tmp_path / "out")
    (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ other }}")
    with pytest.raises(WeightsError, match=r"tool_use\.jinja: not the file that was converted"):
        load(tmp_path / "out")


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(WisparseError, match=f"{folder}: no tokenizer: expected one of tokenizer.json"):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["{", "{}", ""])
def test_a_damaged_tokenizer(folder: Path, text: str) -> None:
    write(folder, "byte level", "<s> $A", NAMED, family=None)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(WisparseError, match=f"{folder}/tokenizer.json: the tokenizer is not usable: "):
        load_tokenizer(folder)


def test_paths_and_strings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = jnp.ones((1, 3), jnp.int32)
    monkeypatch.chdir(folder.parent)
    for name in (folder, str(folder), "model", "./model", Path("model")):
        assert load(name)(tokens).shape == (1, 3, 96)


def test_a_folder_comes_before_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/model"
    assert hub.resolve(name) == Path(name)


def test_demo_is_the_model_in_the_package() -> None:
    assert hub.resolve("demo").parts[-2:] == ("wisparse_jax", "demo_model")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "a/b/c", "../a", "", "org/name with space"])
def test_a_missing_folder_is_named_and_the_network_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_download", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(WisparseError, match="no such folder: expected a model folder, a hub id") as caught:
        hub.resolve(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_not_a_model(folder: Path) -> None:
    with pytest.raises(WisparseError, match=r"model\.safetensors is a file: expected a model folder"):
        load(folder / "model.safetensors")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a model folder holds a config.json"):
        load(tmp_path)


# What a repository may hold beside what is read.
OTHERS = ("original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin", "modeling.py", "README.md")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja")
WHOLE, SHARDS = ("model.safetensors",), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
REPOSITORIES = {
    "whole": ((*WHOLE,), WHOLE),
    "shards": ((*SHARDS, INDEX), (*SHARDS, INDEX)),
    "both": ((*WHOLE, *SHARDS, INDEX), (*WHOLE, INDEX)),
    "another copy": ((*SHARDS, "model.fp16-00001-of-00001.safetensors", INDEX), (*SHARDS, INDEX)),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_only_what_is_read_is_fetched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    held, weights = REPOSITORIES[name]
    repository = [*held, *OTHERS, *TOKENIZER, "config.json", "generation_config.json"]
    fetched: set[str] = set()

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "some-org/Some-Model_1.5B"
        for file in repository:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                fetched.add(file)
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_text(
                    json.dumps({"weight_map": {s: s for s in SHARDS}}) if file == INDEX else ""
                )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = {"config.json", "generation_config.json"}
    for parts, expected in (
        (("config",), config),
        (("config", "tokenizer"), config | set(TOKENIZER)),
        (("config", "weights"), config | set(weights)),
        (hub.EVERYTHING, config | set(TOKENIZER) | set(weights)),
    ):
        fetched.clear()
        assert hub.resolve("some-org/Some-Model_1.5B", parts) == tmp_path
        assert fetched == expected
        (tmp_path / WHOLE[0]).unlink(missing_ok=True)


@pytest.mark.parametrize("known", [True, False])
def test_a_cache_that_lacks_optional_files_is_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Offline; the cache may know what else the repository holds."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit, repository = "0" * 40, tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    if known:
        from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

        names = [*(path.name for path in folder.iterdir()), "generation_config.json", "tokenizer.json"]
        entry = {"size": 1, "blob_id": "1", "lfs_sha256": None, "lfs_size": None, "xet_hash": None}
        write_tree_cache(str(repository), commit, {name: TreeCacheEntry(**entry) for name in names})
    model = load("org/name")
    assert model.name == "org/name" and model(jnp.ones((1, 3), jnp.int32)).shape == (1, 3, 96)
    with pytest.raises(WisparseError, match="no tokenizer: expected one of"):
        load_tokenizer("org/name")
    with pytest.raises(WisparseError, match="it is not in the cache and the hub cannot be reached"):
        load("org/other")


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's own words")
    vars(error).update(response=SimpleNamespace(status_code=500, reason_phrase="Server Error"), server_message=None)
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "there is no such repository, or it is private"),
        ("GatedRepoError", "it is gated: accept its terms on the hub and log in"),
        ("LocalEntryNotFoundError", "it is not in the cache and the hub cannot be reached"),
        ("HfHubHTTPError", "it was not downloaded: 500 Server Error: the hub's own words"),
    ],
)
def test_hub_errors(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(WisparseError, match=f"org/name: no such folder here, and as a hub id {message}"):
        load("org/name")


def test_no_network(tmp_path: Path) -> None:
    """The real client, told to stay offline, with an empty cache."""
    code = (
        "from wisparse_jax.models.hub import resolve\n"
        "from wisparse_jax.errors import WisparseError\n"
        "try: resolve('org/name')\n"
        "except WisparseError as error: print(error)"
    )
    path = ":".join(p for p in sys.path if p)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "org/name: no such folder here, and as a hub id it is not in the cache" in done.stdout


@pytest.mark.parametrize(
    ("raw", "expected"),
    [({"eos_token_id": [5, 6]}, (5, 6)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": None}, (2,)), ({}, (2,))],
)
def test_generation_config_names_the_ends(folder: Path, raw: dict[str, Any], expected: tuple[int, ...]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(raw))
    assert load(folder).config.eos_token_ids == expected


def test_a_damaged_generation_config(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not readable as JSON"):
        read_model_config(folder)
    path.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id = '</s>': expected a whole number"):
        read_model_config(folder)


def test_a_random_checkpoint_loads(folder: Path, tmp_path: Path) -> None:
    """Every tensor in its shape, with other values than the ones before."""
    (tmp_path / "out").mkdir()
    random_checkpoint.write(tmp_path / "out", folder / "config.json", 3)
    model = load(tmp_path / "out")
    assert model.config.num_blocks == 3 and len(load_tokenizer(tmp_path / "out").encode("the sea", bos=False)) > 0
    leaves, shapes = flat(model.params), flat(param_shapes(model.config))
    assert {path: leaf.shape for path, leaf in leaves.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    queries = np.stack([np.asarray(leaves[f"blocks.{b}.q.kernel"]) for b in range(3)])
    assert 0.015 < queries.std() < 0.025 and len(np.unique(queries.reshape(3, -1), axis=0)) == 3
