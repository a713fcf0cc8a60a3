"""Files appear whole or not at all: after an error, on a full disk, and over what was there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtune import files
from mlxtune.arrays import flat
from mlxtune.errors import OutputExists, StorageError
from mlxtune.files import (
    atomic_file,
    atomic_files,
    atomic_folder,
    clear_unfinished,
    write_json,
    write_text,
)
from mlxtune.layers.inject import lora_layers
from mlxtune.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from mlxtune.train.optim import update
from mlxtune.train.run import checkpoints
from support.models import trained_tiny
from support.process import HANGS
from support.program import environment


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with a file's bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def on_a_full_disk(tmp_path):
    """Run Python code that calls `fill_the_disk()`: from there on no file of its process can
    grow beyond `limit` bytes. `folder` is the test's; what is printed comes back."""

    def run(code: str, *, limit: int) -> str:
        prelude = (
            "import resource\n"
            "from pathlib import Path\n"
            f"folder = Path({str(tmp_path)!r})\n"
            "from mlxtune.errors import StorageError\n"
            "def fill_the_disk():\n"
            f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", prelude + code],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=HANGS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_file_appears_with_all_its_bytes_and_its_folders(tmp_path):
    with atomic_file(tmp_path / "a/b/file") as handle:
        handle.write(b"one")
        handle.write(b"two")
        assert not (tmp_path / "a/b/file").exists()
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/file": b"onetwo"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_while_writing_a_file_leaves_what_was_there(tmp_path, failure):
    write_text(tmp_path / "file", "old")
    for name in ("file", "other"):
        with pytest.raises(failure), atomic_file(tmp_path / name) as handle:
            handle.write(b"new")
            raise failure
    assert tree(tmp_path) == {"file": b"old"}


def test_text_and_json_are_written_as_utf8(tmp_path):
    write_text(tmp_path / "text", "naïve 🎉\n")
    write_json(tmp_path / "json", {"é": [1, None]})
    assert (tmp_path / "text").read_bytes() == "naïve 🎉\n".encode()
    assert (tmp_path / "json").read_text(encoding="utf-8") == (
        '{\n  "é": [\n    1,\n    null\n  ]\n}\n'
    )


def test_a_folder_that_another_process_makes_at_the_last_moment_stays(tmp_path, monkeypatch):
    """Between the look and the rename, as two processes that tokenize the same data."""
    target, looks = tmp_path / "folder", []

    def look(path, overwrite, marker):
        own(path, overwrite, marker)
        looks.append(path)
        if len(looks) == 2:
            target.mkdir()
            (target / "theirs").touch()

    own = files._require_free
    monkeypatch.setattr(files, "_require_free", look)
    with pytest.raises(OutputExists), atomic_folder(target) as partial:
        (partial / "ours").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "theirs"]


def test_a_file_where_a_folder_is_needed_is_told(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(StorageError):
        write_text(tmp_path / "file/inside", "new")
    assert tree(tmp_path) == {"file": b"old"}


def test_a_folder_in_a_files_place_is_told(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError):
        write_text(tmp_path / "taken", "new")
    assert tree(tmp_path) == {"taken": None}


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with atomic_folder(tmp_path / "out/model") as folder:
        write_text(folder / "sub/file", "new")
        assert not (tmp_path / "out/model").exists()
    assert tree(tmp_path / "out") == {"model": None, "model/sub": None, "model/sub/file": b"new"}


def test_a_folder_that_exists_is_not_touched(tmp_path):
    write_text(tmp_path / "model/file", "old")
    with pytest.raises(OutputExists) as raised, atomic_folder(tmp_path / "model"):
        pytest.fail("the block must not run")
    assert raised.value.where == str(tmp_path / "model")
    assert tree(tmp_path) == {"model": None, "model/file": b"old"}


def test_overwriting_replaces_all_of_a_folder(tmp_path):
    write_text(tmp_path / "model/old", "old")
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        write_text(folder / "new", "new")
        assert (tmp_path / "model/old").exists()
    assert tree(tmp_path) == {"model": None, "model/new": b"new"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_while_overwriting_leaves_the_old_folder(tmp_path, failure):
    write_text(tmp_path / "model/file", "old")
    with pytest.raises(failure), atomic_folder(tmp_path / "model", overwrite=True) as folder:
        write_text(folder / "file", "new")
        raise failure
    assert tree(tmp_path) == {"model": None, "model/file": b"old"}


def test_the_old_folder_survives_when_the_new_one_cannot_take_its_place(tmp_path):
    write_text(tmp_path / "model/file", "old")
    with (
        pytest.raises((OSError, StorageError)),
        atomic_folder(tmp_path / "model", overwrite=True) as folder,
    ):
        shutil.rmtree(folder)
    assert tree(tmp_path) == {"model": None, "model/file": b"old"}


def test_what_appears_meanwhile_is_not_replaced_unasked(tmp_path):
    with pytest.raises(OutputExists), atomic_folder(tmp_path / "model") as folder:
        write_text(folder / "file", "mine")
        write_text(tmp_path / "model/file", "another's")
    assert tree(tmp_path) == {"model": None, "model/file": b"another's"}


def test_overwriting_a_file_by_a_folder_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "model", "a file")
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        write_text(folder / "file", "new")
    assert tree(tmp_path) == {"model": None, "model/file": b"new"}


def test_overwriting_through_a_link_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "real/file", "old")
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        write_text(folder / "file", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
    assert (tmp_path / "link/file").read_text() == "new"


def test_an_error_of_reading_is_not_called_one_of_writing(tmp_path):
    with pytest.raises(OSError) as raised, atomic_folder(tmp_path / "model"):
        raise PermissionError(13, "Permission denied", "/models/base/model.safetensors")
    assert "/models/base/model.safetensors" in str(raised.value)
    assert tree(tmp_path) == {}


def test_a_full_disk_leaves_the_old_file(tmp_path, on_a_full_disk):
    write_text(tmp_path / "file", "old")
    code = """
from mlxtune.files import write_text
fill_the_disk()
try:
    write_text(folder / "file", "x" * 100_000)
except StorageError as error:
    print(error.where)
"""
    assert on_a_full_disk(code, limit=1000) == str(tmp_path / "file")
    assert tree(tmp_path) == {"file": b"old"}


def test_a_full_disk_leaves_the_old_folder(tmp_path, on_a_full_disk):
    write_text(tmp_path / "model/file", "old")
    code = """
from mlxtune.files import atomic_folder
fill_the_disk()
try:
    with atomic_folder(folder / "model", overwrite=True) as new:
        (new / "small").write_bytes(b"x")
        (new / "large").write_bytes(bytes(100_000))
except StorageError as error:
    print(error.where)
"""
    assert on_a_full_disk(code, limit=1000) == str(tmp_path / "model")
    assert tree(tmp_path) == {"model": None, "model/file": b"old"}


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_filesystem_without_space_leaves_the_old_file(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        write_text(tmp_path / "file", "old")
        with pytest.raises(StorageError, match="No space left"):
            write_text(tmp_path / "file", "x" * 100_000)
        assert tree(tmp_path) == {"file": b"old"}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# 1 kB takes none of a checkpoint's files, and 50 kB the adapter but not the optimizer.
@pytest.mark.parametrize("limit", [1_000, 50_000])
def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(tmp_path, on_a_full_disk, limit):
    code = """
from mlxtune.train.checkpoint import Progress, save_checkpoint
from support.process import HANGS
from support.program import environment
from support.models import trained_tiny
model, optimizer = trained_tiny()
save_checkpoint(folder / "checkpoints", model, optimizer, Progress(step=1), keep=1)
fill_the_disk()
try:
    save_checkpoint(folder / "checkpoints", model, optimizer, Progress(step=2), keep=1)
except StorageError as error:
    print(error.where)
"""
    said = on_a_full_disk(code, limit=limit)
    [left] = checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    model, optimizer = trained_tiny()
    assert load_checkpoint(left, model, optimizer) == Progress(step=1)
    assert said.startswith(str(tmp_path / "checkpoints/step-2"))


def test_what_a_killed_program_left_of_a_file_goes_with_the_next_try(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for process, name in ((dead.pid, "m.gguf"), (os.getppid(), "m.gguf"), (dead.pid, "other")):
        (tmp_path / f".{name}.{process}.partial").mkdir()
    with atomic_files(tmp_path / "m.gguf") as folder:
        (folder / "m.gguf").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f".m.gguf.{os.getppid()}.partial", f".other.{dead.pid}.partial", "m.gguf"]
    )


def test_a_conversion_on_a_full_disk_says_so(tiny_folder, tmp_path, on_a_full_disk):
    code = f"""
from mlxtune.export.convert import convert
fill_the_disk()
try:
    convert({str(tiny_folder)!r}, folder / "m.gguf", file_type="f32", pre="gpt-2")
except StorageError as error:
    print(error.where, error.what)
"""
    said = on_a_full_disk(code, limit=20_000)
    assert str(tmp_path / "m.gguf") in said and "could not write" in said
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_brings_everything_back(tmp_path):
    model, optimizer = trained_tiny()
    for _, layer in lora_layers(model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    update(optimizer, model, model.trainable_parameters())
    before = Progress(3, 0.5, 10, 5, 2, 1.5)
    save_checkpoint(tmp_path, model, optimizer, before, keep=1)
    draws = mx.random.uniform(shape=(4,)).tolist()
    fresh, its_optimizer = trained_tiny()
    assert load_checkpoint(tmp_path / "step-3", fresh, its_optimizer) == before
    assert mx.random.uniform(shape=(4,)).tolist() == draws
    for got, want in [
        (fresh.trainable_parameters(), model.trainable_parameters()),
        (its_optimizer.state, optimizer.state),
    ]:
        assert flat(got).keys() == flat(want).keys()
        assert all(mx.array_equal(flat(got)[name], flat(want)[name]) for name in flat(want))


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    for step in (9, 10, 11):
        save_checkpoint(tmp_path, *trained_tiny(), Progress(step=step), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-10", "step-11"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_report_on_a_full_disk_is_told(tmp_path, on_a_full_disk):
    code = """
from mlxtune.train.run import Run
(folder / "run").mkdir()
fill_the_disk()
try:
    for step in range(100):
        Run(folder / "run").log({"step": step, "loss": 1.0})
except StorageError as error:
    print(error.where)
"""
    assert on_a_full_disk(code, limit=1000) == str(tmp_path / "run/metrics.jsonl")


def test_a_full_disk_leaves_the_run_that_was_to_be_replaced(tmp_path, on_a_full_disk):
    code = """
from mlxtune.recipe.load import parse_recipe
from mlxtune.train.run import Run
values = {"name": "x", "model": {"path": "m"}, "data": [{"path": "d"}]}
recipe = parse_recipe(values, where="")
Run.create(folder / "run", recipe, {}, overwrite=False)
fill_the_disk()
try:
    Run.create(folder / "run", recipe, {}, overwrite=True)
except StorageError:
    print("told")
"""
    assert on_a_full_disk(code, limit=100) == "told"
    assert sorted(tree(tmp_path)) == ["run", "run/recipe.toml", "run/run.json"]


def test_what_killed_programs_left_is_put_right(tmp_path):
    """Killed between the two renames that replace a folder."""
    script = """
import os, sys
from pathlib import Path
from mlxtune.files import atomic_folder
place, rename = Path(sys.argv[1]), Path.rename
def dies(self, target):
    if Path(target) == place:
        os._exit(1)
    return rename(self, target)
Path.rename = dies
with atomic_folder(place, overwrite=True) as folder:
    (folder / "new").write_text("new")
"""
    place = tmp_path / "adapter.best"
    place.mkdir()
    (place / "old").write_text("old")
    (tmp_path / ".hidden").write_text("not ours")
    subprocess.run([sys.executable, "-c", script, str(place)], check=False)
    names = [path.name for path in tmp_path.iterdir()]
    assert place.name not in names
    assert {name.rpartition(".")[2] for name in names} == {"hidden", "replaced", "partial"}
    clear_unfinished(tmp_path)
    old = {place.name: None, f"{place.name}/old": b"old"}
    assert tree(tmp_path) == {".hidden": b"not ours", **old}
