from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_pipelite.adapters.directory import whole_directory
from lightning_pipelite.errors import ConfigurationError


def write(directory: Path, text: str) -> None:
    with whole_directory(directory, ["a.txt", "b*"]) as partial:
        (partial / "a.txt").write_text(text)


def test_new_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter"
    for text in ("first", "second"):
        write(target, text)
        assert (target / "a.txt").read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "adapter", "first")
    with pytest.raises(TypeError):
        write(tmp_path / "adapter", 2)  # type: ignore[arg-type]
    assert (tmp_path / "adapter" / "a.txt").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_anything_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    for name, word in (("thesis", "thesis.tex"), ("file", "file"), ("link", "link")):
        with pytest.raises(ConfigurationError, match=word):
            write(tmp_path / name, "lost")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_all_that_is_written_has_the_mode_that_the_umask_asks_for(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with whole_directory(tmp_path / "saved", []) as partial:
            save_file({"a": torch.zeros(2)}, partial / "adapter_model.safetensors")
            (partial / "config.json").write_text("{}")
            (partial / "templates").mkdir(0o700)
            (partial / "templates" / "a").write_text("")
            (partial / "templates" / "a").chmod(0o400)  # like the file that it was copied from
    finally:
        os.umask(before)
    for path in (tmp_path / "saved").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask
