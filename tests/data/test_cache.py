"""A cache entry is complete or absent, whatever happens to the process that builds it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_pipelite.data.cache import build_once, content_key, file_stamp, tokenizer_stamp
from lightning_pipelite.errors import ConfigurationError

PROCESSES = multiprocessing.get_context("fork")


def write_two(folder: Path) -> None:
    (folder / "first").write_text("1")
    (folder / "second").write_text("2")


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_built_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write_two(folder)

    for _ in range(3):
        assert build_once(tmp_path / "deep" / "cache", "key", build) == tmp_path / "deep" / "cache" / "key"
    assert len(calls) == 1
    assert contents(tmp_path / "deep" / "cache" / "key") == {"first": "1", "second": "2"}


def test_killed_build_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def build_half(folder: Path) -> None:
        (folder / "first").write_text("1")
        (tmp_path / "half").touch()
        time.sleep(60)

    process = PROCESSES.Process(target=build_once, args=(tmp_path / "cache", "key", build_half))
    process.start()
    while not (tmp_path / "half").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    assert not (tmp_path / "cache" / "key").exists()
    assert any(path.is_dir() for path in (tmp_path / "cache").iterdir())
    assert contents(build_once(tmp_path / "cache", "key", write_two)) == {"first": "1", "second": "2"}
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "key",
        "key.lock",
    ]  # the unfinished build is removed


@pytest.mark.parametrize(("ours", "other"), [("node", "node.cluster"), ("node.cluster", "node")])
def test_build_of_a_host_with_a_longer_or_shorter_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str, other: str
) -> None:
    running: list[Path] = []

    def build(folder: Path) -> None:
        running.append(folder)
        write_two(folder)

    monkeypatch.setattr(socket, "gethostname", lambda: other)
    build_once(tmp_path, "key", build).rename(running[0])  # as during the build
    (tmp_path / f"key.{ours}.{'0' * 32}").mkdir()  # left by this host

    monkeypatch.setattr(socket, "gethostname", lambda: ours)
    build_once(tmp_path, "key", write_two)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["key", "key.lock", running[0].name])
    assert contents(running[0]) == {"first": "1", "second": "2"}


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        with (tmp_path / "builds").open("a") as log:
            log.write("x")
        time.sleep(0.2)
        write_two(folder)

    def work() -> None:
        assert contents(build_once(tmp_path / "cache", "key", build)) == {"first": "1", "second": "2"}

    processes = [PROCESSES.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_another_host_was_first(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (tmp_path / "key").mkdir()
        write_two(tmp_path / "key")
        (folder / "first").write_text("ours")

    assert contents(build_once(tmp_path, "key", build)) == {"first": "1", "second": "2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ConfigurationError, "The disk of .* is full: free space"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            ConfigurationError,
            r"cannot be used \(Permission denied\)",
        ),
        (ConfigurationError("a bad line"), ConfigurationError, "a bad line"),
        (KeyError("bug"), KeyError, "bug"),
    ],
)
def test_failed_build(tmp_path: Path, error: Exception, kind: type[Exception], message: str) -> None:
    build_once(tmp_path, "earlier", write_two)

    def fail(folder: Path) -> None:
        write_two(folder)
        raise error

    with pytest.raises(kind, match=message):
        build_once(tmp_path, "key", fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "earlier.lock", "key.lock"]
    assert contents(tmp_path / "earlier") == {"first": "1", "second": "2"}


def test_cache_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigurationError, match=r"The cache directory .*file/cache cannot be used .*: set data\.cache_dir"
    ):
        build_once(tmp_path / "file" / "cache", "key", write_two)


def test_stamps(tmp_path: Path) -> None:
    data = tmp_path / "a.txt"
    data.write_text("one")
    os.utime(data, ns=(0, 1))
    stamp = file_stamp(data)
    assert stamp == (str(data), 3, 1)
    os.utime(data, ns=(0, 2))
    assert file_stamp(data) != stamp

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "merges.txt", "model.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text(name)
    before = tokenizer_stamp(folder)
    assert sorted(before) == ["merges.txt", "tokenizer.json"]
    (folder / "merges.txt").write_text("changed")
    assert tokenizer_stamp(folder) != before
    before = tokenizer_stamp(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert tokenizer_stamp(folder) != before


def test_key_depends_on_content_not_on_order() -> None:
    key: Callable[..., str] = content_key
    assert key({"a": 1, "b": [2]}) == key({"b": [2], "a": 1}) != key({"a": 1, "b": [3]})
    assert len(key({})) == 32
