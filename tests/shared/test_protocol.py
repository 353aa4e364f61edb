"""The protocols between the subpackages are in one file, and the project's own classes implement them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Protocol

import pytest
from torch import nn

from lightning_pipelite import PackedDataModule, PipeLiteModule, PipeLiteStrategy
from lightning_pipelite.callbacks import SaveTrained, TimedCheckpoint
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models.layers import CausalLMLayers
from lightning_pipelite.models.loss import CausalLMLoss
from lightning_pipelite.shared import protocol
from lightning_pipelite.shared.protocol import LayerCosts
from lightning_pipelite.strategy.layers import SequentialLayers
from lightning_pipelite.strategy.partition import partition

ROOT = Path(__file__).parents[2]
QUESTIONS = {
    name: kind
    for name, kind in vars(protocol).items()
    if isinstance(kind, type) and Protocol in kind.__mro__ and kind is not Protocol
}
ANSWERED_BY: dict[str, list[Any]] = {
    "HandsOutLayers": [PipeLiteModule],
    "PipelineLayers": [CausalLMLayers, SequentialLayers],
    "KnowsCosts": [CausalLMLayers],
    "MayBeWhole": [CausalLMLayers],
    "NamesSums": [CausalLMLoss],
    "LogsEvaluation": [PipeLiteModule],
    "EvaluatesTogether": [PipeLiteModule],
    "KnowsMetrics": [PipeLiteModule],
    "IdentifiesItself": [PipeLiteModule],
    "AllowsAnother": [PipeLiteModule],
    "KeepsResults": [SaveTrained, TimedCheckpoint],
    "MayOverwrite": [SaveTrained, TimedCheckpoint],
    "TimesStages": [PipeLiteStrategy],
    "SavesTrained": [PipeLiteModule],
    "ChecksSaving": [PipeLiteModule],
    "WritesText": [PipeLiteModule],
    "DealsData": [PipeLiteStrategy],
    "ChecksVocabulary": [PackedDataModule],
}


def members(kind: type) -> set[str]:
    """Return the members that a protocol requires."""
    asked = {name for each in kind.__mro__ for name in vars(each).get("__annotations__", {})}
    asked |= {name for each in kind.__mro__ if each.__module__ == protocol.__name__ for name in vars(each)}
    return {name for name in asked if not name.startswith("_")}


ASKED = {name for kind in QUESTIONS.values() for name in members(kind)} - {"names", "logged", "logs", "overwrite"}


def test_every_question_has_an_answer_in_the_package() -> None:
    assert {*QUESTIONS} == {*ANSWERED_BY}
    for name, kinds in ANSWERED_BY.items():
        for kind in kinds:
            source = ast.unparse(ast.parse(Path(ROOT / (kind.__module__.replace(".", "/") + ".py")).read_text()))
            for member in members(QUESTIONS[name]):  # a class attribute, or an instance's
                assert hasattr(kind, member) or f"self.{member} = " in source or f"self.{member}: " in source, member


def test_nobody_asks_in_another_way() -> None:
    """With getattr and the like, a type checker sees no access, and a renamed member silently counts as missing."""
    found = []
    for path in ROOT.glob("lightning_pipelite/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
                if node.func.id in ("getattr", "hasattr", "setattr") and {*names} & ASKED:
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


class Costed(SequentialLayers):
    """Layers of which the first takes as long as the three others together."""

    known = True

    def layer_costs(self) -> LayerCosts | None:
        return LayerCosts([3, 1, 1, 1], [0] * 4, [0] * 4, micro_batches=2) if self.known else None


def test_costs_that_are_not_known_are_as_none() -> None:
    layers = Costed([nn.Linear(2, 2) for _ in range(4)])
    assert partition(layers, 2, "auto") == [0, 1, 4]
    layers.known = False
    for each in (layers, SequentialLayers([nn.Linear(2, 2) for _ in range(4)])):
        with pytest.raises(ConfigurationError, match="the layers do not report their costs"):
            partition(each, 2, "auto")


def test_the_names_of_sums_are_those_of_the_loss() -> None:
    assert protocol.names_of_sums(CausalLMLoss(0.1)) == ("router_aux_loss",)
    assert protocol.names_of_sums(CausalLMLoss()) == ()
    assert protocol.names_of_sums(nn.functional.cross_entropy) == ()
