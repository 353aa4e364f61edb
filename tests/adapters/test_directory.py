from __future__ import annotations

from pathlib import Path

import pytest

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
