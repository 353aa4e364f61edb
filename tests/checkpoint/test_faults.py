"""Faults of a checkpoint on disk, or of the disk: each has its own message, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_pipelite.checkpoint import read_checkpoint
from lightning_pipelite.checkpoint.layout import MANIFEST, MANIFEST_HASH
from lightning_pipelite.checkpoint.manifest import write_manifest
from lightning_pipelite.checkpoint.reader import newest
from lightning_pipelite.checkpoint.store import CheckpointStore
from lightning_pipelite.checkpoint.written_file import Written, write_file
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.shared.topology import Topology

IDENTITY = {"base_model": "abc", "adapter": {"class_path": "LoRA", "init_args": {"rank": 4}}}
FILES = ("manifest.json", "manifest.sha256", "meta.json", "stage-00.json", "stage-00.safetensors", "trainer.json",
         "trainer.safetensors")  # fmt: skip


def build(inputs: int = 4, optimizer: Any = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(inputs, 3), nn.BatchNorm1d(3))
    layer.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    return layer, optimizer(layer.parameters(), lr=0.1)


def step(layer: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (layer.scale * layer(torch.arange(8.0).view(2, 4))).square().sum().backward()
    optimizer.step()


@pytest.fixture
def store() -> Iterator[CheckpointStore]:
    made = CheckpointStore(Topology(1, 1), 0, torch.device("cpu"), timedelta(seconds=60))
    yield made
    made.close()


def save(store: CheckpointStore, path: Path, state: Any = None, **options: Any) -> Path:
    layer, optimizer = build(**options)
    step(layer, optimizer)
    tensor_state = {"callbacks": {"score": torch.ones(3)}, **(state or {})}
    meta = {"stages": 1, "identity": IDENTITY, "step": 1}
    store.save(path, tensor_state, meta, layer, optimizer)
    store.wait()
    return path


def load(store: CheckpointStore, path: Path, identity: Any = IDENTITY, **options: Any) -> Any:
    layer, optimizer = build(**options)
    state, _ = store.open(path, identity)
    store.load_parameters(layer)
    store.load_optimizer(layer, optimizer)
    return state, layer, optimizer


def holds_one_step(store: CheckpointStore, path: Path) -> None:
    """Check that the checkpoint restores everything that :func:`save` has put into it."""
    layer, optimizer = build()
    step(layer, optimizer)
    state, again, fresh = load(store, path)
    expected = ({"score": torch.ones(3)}, layer.state_dict(), optimizer.state_dict()["state"])
    found = (state["callbacks"], again.state_dict(), fresh.state_dict()["state"])
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
def test_training_goes_on_to_the_bit(store: CheckpointStore, tmp_path: Path, kind: Any) -> None:
    """With optimizer state of another shape than its parameter, a scalar parameter, and buffers."""
    save(store, tmp_path / "a", optimizer=kind)
    layer, optimizer = build(optimizer=kind)
    step(layer, optimizer)
    state, again, fresh = load(store, tmp_path / "a", optimizer=kind)
    for each in ((layer, optimizer), (again, fresh)):
        step(*each)
    assert torch.equal(state["callbacks"]["score"], torch.ones(3))
    torch.testing.assert_close(layer.state_dict(), again.state_dict(), atol=0, rtol=0)


def test_what_is_copied_may_change_at_once(store: CheckpointStore, tmp_path: Path) -> None:
    layer, optimizer = build()
    score = torch.ones(2)
    store.save(tmp_path / "a", {"score": score}, {"stages": 1, "identity": {}}, layer, optimizer)
    before = layer.state_dict()["0.weight"].clone()
    with torch.no_grad():
        layer[0].weight.zero_()  # type: ignore[index]
        score.zero_()
    store.wait()
    assert torch.equal(dict(read_checkpoint(tmp_path / "a")[1])["0.weight"], before)
    assert store.open(tmp_path / "a", {})[0]["score"].tolist() == [1.0, 1.0]


def test_other_programs_read_it(store: CheckpointStore, tmp_path: Path) -> None:
    """A checkpoint is read with the tools that docs/checkpoints.md names, without Lightning or DeepSpeed."""
    path = save(store, tmp_path / "a")
    assert sorted(each.name for each in path.iterdir()) == sorted(FILES)
    subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST_HASH], cwd=path, check=True)
    assert set(load_file(path / "stage-00.safetensors")) >= {"parameter/scale", "optimizer/0.weight/exp_avg"}
    meta, tensors = read_checkpoint(path)
    assert meta["identity"] == IDENTITY
    assert {name: tuple(t.shape) for name, t in tensors} == {
        "0.weight": (3, 4), "0.bias": (3,), "1.weight": (3,), "1.bias": (3,), "scale": (),
    }  # fmt: skip
    code = "import sys, lightning_pipelite.checkpoint; print({'lightning', 'deepspeed'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout == "set()\n"


# Faults of the files


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_told_and_the_checkpoint_before_is_taken(
    store: CheckpointStore, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    whole, damaged = save(store, tmp_path / "a"), save(store, tmp_path / "b")
    damage(damaged / name)
    with pytest.raises(
        ConfigurationError, match=r"^ckpt_path: .*; name another checkpoint|is not a checkpoint"
    ) as error:
        load(store, damaged)
    # A hash that differs may be that of another manifest, so the manifest is named.
    named = MANIFEST if name == MANIFEST_HASH and damage is not Path.unlink else name
    assert named in str(error.value)
    found, passed_over = newest([tmp_path])
    assert found == whole
    assert len(passed_over) == 1
    shutil.rmtree(whole)
    with pytest.raises(ConfigurationError, match="there is no intact checkpoint for `last`"):
        newest([tmp_path])


def rewritten(path: Path) -> None:
    """Rewrite the manifest of a directory to match its files."""
    names = [each for each in FILES if not each.startswith("manifest")]
    files = {}
    for name in names:
        content = (path / name).read_bytes()
        (path / name).unlink()
        files[name] = write_file(path / name, content)
    for name in (MANIFEST, MANIFEST_HASH):
        (path / name).unlink()
    write_manifest(path, files)


def test_what_may_differ_is_told_and_can_be_allowed(store: CheckpointStore, tmp_path: Path) -> None:
    path, other = save(store, tmp_path / "a"), {**IDENTITY, "base_model": "abd"}
    with pytest.raises(ConfigurationError, match=r"'abd' now; set model\.another to true to continue anyway"):
        store.open(path, other, {"base_model": (False, "model.another")})
    message = r"'abc' in the checkpoint, 'abd' now; training continues, as model\.another is set"
    with pytest.warns(UserWarning, match=message):
        store.open(path, other, {"base_model": (True, "model.another")})
    other = {**other, "adapter": {"class_path": "LoRA", "init_args": {"rank": 8}}}
    with pytest.raises(ConfigurationError, match="rank is 4 in the checkpoint, 8 now"):
        store.open(path, other, {"base_model": (True, "model.another")})


def test_of_another_model_adapter_optimizer_or_version(store: CheckpointStore, tmp_path: Path) -> None:
    path = save(store, tmp_path / "a")
    cases = (
        ({"identity": {**IDENTITY, "base_model": "abd"}}, "base_model is 'abc' in the checkpoint, 'abd' now"),
        ({"identity": {**IDENTITY, "adapter": {"class_path": "LoRA", "init_args": {"rank": 8}}}},
         "adapter.init_args.rank is 4 in the checkpoint, 8 now"),
        ({"inputs": 5}, r"the parameter 0.weight with shape \[3, 4\], not \[3, 5\]"),
        ({"optimizer": torch.optim.SGD},
         "was saved with the optimizer torch.optim.adamw.AdamW, not torch.optim.sgd.SGD"),
    )  # fmt: skip
    for options, sentence in cases:
        with pytest.raises(ConfigurationError, match=sentence):
            load(store, path, **options)  # type: ignore[arg-type]
    tensors = load_file(path / "stage-00.safetensors")
    for change, sentence in (
        ({"parameter/more": torch.ones(1)}, "holds the parameter more, which is not trained here"),
        ({"parameter/scale": None}, "does not hold the parameter scale"),
        ({"parameter/scale": torch.ones((), dtype=torch.bfloat16)}, "with dtype torch.bfloat16, not torch.float32"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, path / "stage-00.safetensors")
        rewritten(path)
        with pytest.raises(ConfigurationError, match=sentence):
            load(store, path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).unlink()
    (path / MANIFEST_HASH).unlink()
    written: Written = write_file(path / MANIFEST, json.dumps({**manifest, "version": 2}).encode())
    write_file(path / MANIFEST_HASH, f"{written.sha256}  {MANIFEST}\n".encode())
    with pytest.raises(ConfigurationError, match=r"is in version 2 .* use the version that wrote it"):
        load(store, path)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_any_place_runs_no_code(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    path, marker = save(store, tmp_path / "a"), tmp_path / "executed"
    torch.save({"state": Hostile(marker)}, tmp_path / "hostile.pt")
    for content in (pickle.dumps(Hostile(marker)), (tmp_path / "hostile.pt").read_bytes()):
        (path / name).write_bytes(content)
        if not name.startswith("manifest"):
            rewritten(path)  # an attacker who replaces a file can replace its hash, too
        with pytest.raises(ConfigurationError, match=r"^ckpt_path: "):
            load(store, path)
        assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # loading the pickle does run its code


# Faults of the disk


def failing_write(store: CheckpointStore, good: Path, bad: Path, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"could not be written .*{reason}.* training continues"):
        save(store, bad)
    assert not bad.exists()
    assert not [path for path in bad.parent.iterdir() if path.name.startswith(".")]
    holds_one_step(store, good)


def test_a_small_disk_that_is_full(store: CheckpointStore, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if (mounting := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounting.stderr.strip()}")
    try:
        good = save(store, disk / "a")
        (disk / "filler").write_bytes(b"0" * 24_000)
        failing_write(store, good, disk / "b", "No space left on device")
        store.remove(good)  # as ModelCheckpoint does; ignored while there is no newer one
        holds_one_step(store, good)
        (disk / "filler").unlink()
        save(store, disk / "b")
        assert [path.name for path in disk.iterdir()] == ["b"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # tensors of a failed check may still use it


def test_a_limit_to_the_size_of_files(store: CheckpointStore, tmp_path: Path) -> None:
    """As under a disk quota: writing fails partway through a file."""
    good = save(store, tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        failing_write(store, good, tmp_path / "b", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_directory_that_cannot_be_written(store: CheckpointStore, tmp_path: Path) -> None:
    """A file in place of the directory, which stops even root, and a directory without write permission."""
    good = save(store, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"could not be written \((Not a directory|File exists)\)"):
        save(store, tmp_path / "file" / "b")
    holds_one_step(store, good)
    if os.geteuid() != 0:
        tmp_path.chmod(0o555)
        try:
            failing_write(store, good, tmp_path / "b", "Permission denied")
        finally:
            tmp_path.chmod(0o755)


def test_what_killed_processes_leave(store: CheckpointStore, tmp_path: Path) -> None:
    """Partial directories are removed, a checkpoint that was being replaced is restored, and can be replaced again."""
    path = save(store, tmp_path / "last.ckpt")
    shutil.copytree(path, tmp_path / ".b.ckpt.0123abcd.ckpt-partial")
    assert newest([tmp_path]) == (path, [])
    path.rename(tmp_path / ".last.ckpt.0123abcd.ckpt-old")
    holds_one_step(store, path)
    assert newest([tmp_path])[0] == tmp_path / ".last.ckpt.0123abcd.ckpt-old"
    save(store, tmp_path / "c.ckpt")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c.ckpt", "last.ckpt"]
    save(store, path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["c.ckpt", "last.ckpt"]
