"""Writes YAML with comments above the keys that they describe."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]


class CommentedYaml:
    """Collects comments and writes them with the content."""

    def __init__(self) -> None:
        self._comments: dict[tuple[str, ...], list[str]] = {}

    def say(self, comment: str, *place: str) -> None:
        """Add a comment above the key at the path ``place``, which leads through dicts only."""
        self._comments.setdefault(place, []).append(comment)

    def text(self, content: dict[str, Any]) -> str:
        """Return the YAML of ``content``."""
        return "\n".join(self._lines(content, ())) + "\n"

    def _lines(self, content: dict[str, Any], place: tuple[str, ...]) -> list[str]:
        lines: list[str] = []
        indent = "  " * len(place)
        for key, value in content.items():
            here = (*place, key)
            lines += [f"{indent}# {comment}" for comment in self._comments.get(here, ())]
            if isinstance(value, dict):
                lines += [f"{indent}{key}:", *self._lines(value, here)]
            else:
                text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=1000)
                lines += [f"{indent}{line}" for line in text.splitlines()]
        return lines
