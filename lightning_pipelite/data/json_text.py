"""Iterates over the records of JSON text, each with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_BLANK = re.compile(r"[ \t\n\r]*")
_BRACKETS_AND_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_decode = json.JSONDecoder().raw_decode


class UnreadableError(Exception):
    """JSON that cannot be read; the message says why.

    Args:
        reason: What is wrong, and what to do.
        line: Line of the error, from 0.
    """

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class Element:
    """An element of a list.

    Args:
        line: Line where it begins, from 0.
        parse: Returns its value, or raises `UnreadableError`.
    """

    line: int
    parse: Callable[[], Any]


def parse(text: str) -> Any:
    """Parse JSON text.

    Raises:
        UnreadableError: If it is not JSON, or JSON that Python cannot parse.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(error) from None


def is_lines(text: str) -> bool:
    """Return whether text is JSON Lines, not a single JSON value: several lines, one of which is a value on its own."""
    first, _, rest = text.strip().partition("\n")
    if not rest:
        return False
    if _is_value(first):
        return True
    try:  # a single value that spans several lines
        _decode(text.strip())
    except json.JSONDecodeError:  # either that value is damaged, or these are JSON Lines whose first line is damaged
        return first.startswith("{") and any(map(_is_value, rest.split("\n", 8)[:8]))
    except (ValueError, RecursionError):
        pass
    return False


def elements(text: str) -> Iterator[Element]:
    """Iterate over the elements of a list, so that one unreadable element does not hide the others.

    Args:
        text: JSON that begins with a bracket.

    Raises:
        UnreadableError: If it is not JSON; the rest is lost, because the start of the next element is unknown.
    """
    at, line = _after_blank(text, text.index("[") + 1), text.count("\n", 0, text.index("["))
    counted = text.index("[")
    if text[at : at + 1] == "]":
        _check_end(text, at + 1)
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = _decode(text, at)
        except json.JSONDecodeError as error:
            raise _unreadable(error) from None
        except (ValueError, RecursionError) as error:
            behind = _end_of(text, at)
            if behind is None:
                raise _unreadable(error, line) from None
            end = behind

            def fail(error: Exception = error, line: int = line) -> Any:
                raise _unreadable(error, line)

            yield Element(line, fail)
        else:
            yield Element(line, lambda value=value: value)  # type: ignore[misc]
        at = _after_blank(text, end)
        if text[at : at + 1] == "]":
            _check_end(text, at + 1)
            return
        if text[at : at + 1] != ",":
            raise _unreadable(json.JSONDecodeError("Expecting ',' delimiter", text, at))
        at = _after_blank(text, at + 1)


def _unreadable(error: Exception, line: int = 0) -> UnreadableError:
    if isinstance(error, json.JSONDecodeError):
        return UnreadableError(
            f"not valid JSON ({error.msg}, column {error.colno}); correct the line.", error.lineno - 1
        )
    if isinstance(error, RecursionError):
        return UnreadableError("JSON nested too deeply; correct the file.", line)
    return UnreadableError("a number with more digits than Python can parse; write it as text.", line)


def _end_of(text: str, at: int) -> int | None:
    """Return the end of an element that Python cannot parse: the next comma or bracket, or None if there is none."""
    depth = 0
    for match in _BRACKETS_AND_STRINGS.finditer(text, at):
        token = match[0]
        if depth == 0 and token in ",]":
            return match.start()
        depth += (token in "[{") - (token in "]}")
    return None


def _after_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _check_end(text: str, at: int) -> None:
    if not _is_blank(text, at):
        raise _unreadable(json.JSONDecodeError("Extra data", text, _after_blank(text, at)))


def _is_blank(text: str, at: int) -> bool:
    return _after_blank(text, at) == len(text)


def _is_value(line: str) -> bool:
    """Return whether a line on its own is an object, a list or a string, even one that Python cannot parse."""
    if line.lstrip()[:1] not in ("{", "[", '"'):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        return not isinstance(error, json.JSONDecodeError)
    return True
