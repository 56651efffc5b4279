"""Plans pushed to and pulled from a stand-in of the hub on this machine, by huggingface_hub's own client."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from wisparse_jax.sparsity import SparsityPlan
from wisparse_jax.sparsity.sharing import card

COMMIT = "c" * 40
PLAN = Path(__file__).parents[1] / "fixtures" / "format-2" / "plan"
HELD_OUT = {
    "windows": 4,
    "dense_perplexity": 12.25,
    "plan": {"kl": 0.1234, "perplexity": 13.5, "sparsity": 0.5012},
    "teal": {"kl": 0.2345, "perplexity": 15.5, "sparsity": 0.5001},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as a push and a pull of one repository need; large files by LFS, as the hub has it."""

    server: Any  # a Server

    def log_message(self, format, *args):
        """Say nothing."""

    def answer(self, body: Any = b"", status: int = 200, **headers: str):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "POST" and self.headers.get("Authorization") != "Bearer hf_writer":
            return self.answer({"error": "no"}, 403, X_Error_Message="You may not write here")
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.answer({"url": f"{hub.address}/some-org/half", "id": "some-org/half"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/models/some-org/half/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            return self.answer(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        if path == "/some-org/half.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            to = [{"upload": {"href": f"{hub.address}/store/{thing['oid']}"}} for thing in objects]
            made = [thing | {"actions": actions} for thing, actions in zip(objects, to, strict=True)]
            return self.answer({"transfer": "basic", "objects": made})
        if path.startswith("/store/"):
            hub.stored[path.removeprefix("/store/")] = body
            return self.answer()
        if path == "/api/models/some-org/half/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            return self.answer({"commitUrl": f"{hub.address}/some-org/half/commit/{COMMIT}", "commitOid": COMMIT})
        if path == "/api/models/some-org/half/revision/main":
            return self.answer({"id": "some-org/half", "sha": COMMIT, "siblings": []})
        if path == f"/api/models/some-org/half/tree/{COMMIT}":
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in hub.files.items()}
            return self.answer(
                [{"type": "file", "path": n, "size": len(hub.files[n]), "oid": oid} for n, oid in oids.items()]
            )
        where, _, name = path.partition(f"/some-org/half/resolve/{COMMIT}/")
        if where == "" and name in hub.files:
            data = hub.files[name]
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


class Server(http.server.ThreadingHTTPServer):
    """The stand-in: what it holds and what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.asked, self.created = [], []


@pytest.fixture(scope="module")
def hub():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(hub, folder, *arguments, token="hf_writer", offline="0", address=None):
    """Python in a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": address or hub.address,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(folder),
        "HF_TOKEN": token,
    }
    settings |= {"PYTHONPATH": str(Path.cwd()), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, *arguments], env=os.environ | settings, capture_output=True, text=True)


FORBIDDEN = "403 Forbidden: You may not write here no; log in with a token that may do this: hf auth login"
PUSH = """
import dataclasses, json, sys
import wisparse_jax as ws
plan = dataclasses.replace(ws.SparsityPlan.load(sys.argv[1]), held_out=json.loads(sys.argv[2]))
try:
    print(plan.push("some-org/half", base_model="some-org/Model-1B", private=True))
except ws.PlanError as error:
    sys.exit(str(error))
"""


def test_a_plan_is_pushed_and_pulled(hub, tmp_path):
    refused = run(hub, tmp_path / "a", "-c", PUSH, str(PLAN), json.dumps(HELD_OUT), token="hf_reader")
    assert refused.returncode == 1 and not hub.files
    assert refused.stderr.strip() == f"some-org/half: it was not uploaded: {FORBIDDEN}"
    pushed = run(hub, tmp_path / "a", "-c", PUSH, str(PLAN), json.dumps(HELD_OUT))
    assert pushed.stdout.strip() == f"{hub.address}/some-org/half/commit/{COMMIT}", pushed.stderr
    assert hub.created[-1]["name"] == "half" and "private" in json.dumps(hub.created[-1])
    assert set(hub.files) == {"plan.json", "tensors.safetensors", "history.json", "README.md"}
    hub.files["checkpoint.bin"] = b"what nobody needs"

    hub.asked.clear()
    shown = run(hub, tmp_path / "b", "-m", "wisparse_jax", "show", "some-org/half")
    assert "wisparse-plus plan: target 0.5000" in shown.stdout and "0.1234" in shown.stdout, shown.stderr
    fetched = {path.rpartition("/")[2] for method, path in hub.asked if method == "GET" and "/resolve/" in path}
    assert fetched == {"plan.json", "tensors.safetensors", "history.json"}

    # What was pulled once is used without the hub, what was not is one line.
    again = run(hub, tmp_path / "b", "-m", "wisparse_jax", "show", "some-org/half", offline="1")
    assert again.stdout == shown.stdout, again.stderr
    other = run(hub, tmp_path / "b", "-m", "wisparse_jax", "show", "some-org/other", offline="1")
    assert other.returncode == 2 and other.stderr.strip().endswith(
        "some-org/other: no such folder here, and as a hub id it is not in the cache and the hub cannot be reached "
        "(no network?)"
    )


def test_the_command_pushes_what_it_was_given(hub, tmp_path):
    hub.files.clear()
    options = ["--base-model", "some-org/Model-1B", "--private"]
    pushed = run(hub, tmp_path, "-m", "wisparse_jax", "push", str(PLAN), "some-org/half", *options)
    assert (pushed.returncode, pushed.stdout, pushed.stderr) == (
        0,
        f"{hub.address}/some-org/half/commit/{COMMIT}\n",
        "",
    )
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    found, given = (SparsityPlan.load(folder).thresholds.astype(np.float32) for folder in (tmp_path, PLAN))
    np.testing.assert_array_equal(found, given)
    assert b"base_model: some-org/Model-1B" in hub.files["README.md"] and "private" in json.dumps(hub.created[-1])


HERE = "some-org/half: it was not uploaded:"
NOT_PUSHED = {
    "no plan": ("none some-org/half", {}, "none: expected a plan folder, found no such folder"),
    "no org": ("{plan} half", {}, "'half': cannot be a repository on the hub: expected org/name"),
    "no name on the hub": ("{plan} some--org/half", {}, "some--org/half: it was not uploaded: Cannot have -- or .. in"),
    "another's token": ("{plan} some-org/half", {"token": "hf_reader"}, f"{HERE} {FORBIDDEN}"),
    "no token": ("{plan} some-org/half", {"token": ""}, f"{HERE} {FORBIDDEN}"),
    "offline": ("{plan} some-org/half", {"offline": "1"}, f"{HERE} the hub cannot be reached: Cannot reach http"),
    "no network": ("{plan} some-org/half", {"address": "http://127.0.0.1:9"}, f"{HERE} the hub cannot be reached: "),
}


@pytest.mark.parametrize("name", NOT_PUSHED)
def test_what_cannot_be_pushed_is_one_line(hub, tmp_path, name):
    words, how, message = NOT_PUSHED[name]
    hub.files.clear()
    done = run(hub, tmp_path, "-m", "wisparse_jax", "push", *words.format(plan=PLAN).split(), **how)
    assert done.returncode == 2 and done.stdout == "" and not hub.files
    assert done.stderr.startswith(f"wisparse: error: {message}") and done.stderr.count("\n") == 1, done.stderr


def test_the_card_says_what_somebody_needs():
    plan = SparsityPlan.load(PLAN)
    fields = {"held_out": HELD_OUT, "calibration": {"text": "self", "tokens": 8192, "window": 512}}
    text = card(SparsityPlan(**{**plan.__dict__, **fields}), "some-org/half", "some-org/Model-1B")
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {
        "base_model": "some-org/Model-1B",
        "library_name": "wisparse-jax",
        "tags": ["activation-sparsity", "wisparse"],
    }
    assert "wisparse generate some-org/Model-1B --plan some-org/half" in body
    assert 'ws.load("some-org/Model-1B", plan="some-org/half")' in body
    assert "| this plan (wisparse-plus) | 13.50 | 0.1234 | 0.5012 |\n| teal | 15.50 | 0.2345 | 0.5001 |\n" in body
    assert "8192 tokens of self in windows of 512, seed 3. `self` is text that the dense model sampled." in body
    row = " | ".join(f"{value:.3f}" for value in [*plan.sparsities.mean(axis=0), plan.mean_sparsity])
    assert f"| sparsity, mean over 3 blocks | {row} |" in body


def test_text_of_a_plan_is_no_markup_in_its_card():
    plan = SparsityPlan.load(PLAN)
    evil = "<script>alert(1)</script> | [here](http://x)\n\n# Heading"
    fields = {"method": evil, "calibration": {"text": evil, "tokens": 1, "window": 1}, "history": {"notes": [evil]}}
    body = card(SparsityPlan(**{**plan.__dict__, **fields}), "some-org/half").partition("\n---\n")[2]
    assert "<script" not in body and "[here](" not in body and "\n# Heading" not in body and " | \\[" not in body
    assert "MODEL" in body and np.isfinite(plan.thresholds).all()
