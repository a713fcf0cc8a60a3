"""Models of the hub, from a stand-in of it: what is fetched, and when.

The stand-in answers what huggingface_hub asks for: facts of a revision, and files with
their ETag and commit. The client is the real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from gguf import GGUFReader

from mlxtune.adapters.store import save_adapter
from support.files import SHELL_TRAIN, write_jsonl
from support.models import tiny_llama, with_adapters
from support.process import HANGS
from support.program import environment as own_environment

NAME, COMMIT = "owner/tiny", "c0ffee" + "0" * 34


class Hub:
    """One model, served; `asked` has the files that were fetched, in order."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(head=True)

            def do_GET(self) -> None:
                self.answer(head=False)

            def answer(self, head: bool) -> None:
                place, headers = self.path.partition("?")[0], {}
                if place.startswith(f"/api/models/{NAME}/tree/"):
                    files = [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                        for f in sorted(folder.iterdir())
                    ]
                    body = json.dumps(files).encode()
                elif place.startswith(f"/api/models/{NAME}"):
                    siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                    facts = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings}
                    body = json.dumps(facts).encode()
                elif place.startswith(f"/{NAME}/resolve/"):
                    file = folder / place.rpartition("/")[2]
                    if not file.is_file():
                        self.send_response(404)
                        self.send_header("X-Error-Code", "EntryNotFound")
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                        return
                    body = file.read_bytes()
                    headers = {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                    if not head:
                        hub.asked.append(file.name)
                else:
                    body = b"{}"
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if not head:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tiny_folder):
    hub = Hub(tiny_folder)
    yield hub
    hub.server.shutdown()


@pytest.fixture
def program(hub, tmp_path):
    """The program in a folder with a recipe for the hub's model, and a cache of its own."""
    rows = [json.loads(line) for line in SHELL_TRAIN.read_text().splitlines()[:16]]
    write_jsonl(tmp_path / "data.jsonl", rows)
    (tmp_path / "r.toml").write_text(
        f'name = "t"\nmodel = {{path = "{NAME}"}}\ndata = [{{path = "data.jsonl"}}]\n'
        # Little is left to be advised.
        "lora = {rank = 4}\n[train]\nmax_steps = 1\nbatch_size = 1\nmax_seq_length = 256\n"
        'optimizer = "lion"\ngradient_checkpointing = true\n'
    )

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlxtune", *arguments],
            cwd=tmp_path,
            env=own_environment()
            | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")}
            | {"HF_HUB_OFFLINE": "0"}
            | environment,
            capture_output=True,
            text=True,
            timeout=HANGS,
        )

    return run


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_its_weights_are_fetched(hub, program, tmp_path):
    refused = program("lora", "r.toml", "--set", "train.memory_limit=0.001")
    assert refused.returncode == 1 and "memory" in refused.stderr, refused.stderr
    assert "tokenizer.json" in hub.asked and "config.json" in hub.asked
    assert not [name for name in hub.asked if name.endswith(".safetensors")]
    assert not (tmp_path / "runs").exists()
    offline = program("lora", "r.toml", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "Traceback" not in offline.stderr
    assert "HF_HUB_OFFLINE" in offline.stderr
    trained = program("lora", "r.toml")
    assert trained.returncode == 0, trained.stderr
    assert hub.asked.count("model.safetensors") == 1


def test_an_adapter_alone_is_written_without_the_weights_of_its_base(hub, program, tmp_path):
    adapted = with_adapters(tiny_llama(vocabulary=258), ["model.layers.0.mlp.up_proj"])
    save_adapter(tmp_path / "adapter", adapted, base=NAME)
    done = program("export", "adapter", "--adapter-only", "--output=out")
    assert done.returncode == 0, done.stderr
    written = GGUFReader(tmp_path / "out/adapter.gguf")
    assert written.fields["general.base_model.0.name"].contents() == NAME
    assert hub.asked and not [name for name in hub.asked if name.endswith(".safetensors")]
