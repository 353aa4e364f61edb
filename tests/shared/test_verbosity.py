"""How warnings are shown."""

from __future__ import annotations

import warnings

import pytest

from lightning_pipelite.shared import verbosity


def shown(file: object) -> str:
    return warnings.formatwarning("it is so", UserWarning, str(file), 7, "code")


def test_own_warnings_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    before = warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", before)
    monkeypatch.setenv(verbosity.VARIABLE, "1")
    verbosity.say_warnings_plainly()
    assert warnings.formatwarning is before
    monkeypatch.delenv(verbosity.VARIABLE)
    others = shown("/elsewhere/x.py")
    for _ in range(2):  # nothing is wrapped twice
        verbosity.say_warnings_plainly()
        plain = warnings.formatwarning
    verbosity.say_warnings_plainly()
    assert warnings.formatwarning is plain
    assert shown(verbosity.PACKAGE / "module" / "optimization.py") == "warning: it is so\n"
    assert shown("/elsewhere/x.py") == others
