"""Importing a module changes nothing in the process; what must be changed is changed by a call where it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*sorted(ROOT.glob("lightning_pipelite/**/*.py")), *sorted(ROOT.glob("kernels/*.py"))]

ALLOWED = {
    # The Trainer finds the strategy by its name, and Lightning's own loaders read its checkpoints.
    "PipeLiteStrategy.register_strategies",
    "lightning_compat.install",
    # Defines operations in torch's registry, under names of our own.
    "_LIBRARY.define",
    "torch.library.register_autograd",
    "torch.library.register_fake",
    "start",  # in __main__
}

WATCHED = """
import importlib, logging, os, pkgutil, signal, sys, warnings

# What these do when they are imported is theirs.
import deepspeed, lightning.pytorch, matplotlib.pyplot, optimi, peft, torch, transformers, triton
import bitsandbytes, deepspeed.runtime.pipe.engine, lightning.pytorch.cli, tensorboard.summary, torch.utils.tensorboard
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS


def state():
    backends = torch.backends
    return {
        "masks": {name: MASKS[name] for name in MASKS},
        "attentions": {name: ATTENTIONS[name] for name in ATTENTIONS},
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "loggers": {
            name: (logger.level, logger.propagate, [*logger.handlers])
            for name, logger in {"": logging.root, **logging.root.manager.loggerDict}.items()
            if isinstance(logger, logging.Logger) and not name.startswith("lightning_pipelite")
        },
        "excepthook": sys.excepthook,
        "torch": [
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark,
            torch.nn.functional.scaled_dot_product_attention, torch.autocast, torch.load, torch.nn.Module.__call__,
        ],
        "transformers": [transformers.PreTrainedModel.from_pretrained.__func__, transformers.Trainer],
    }


before = state()
import lightning_pipelite

for module in pkgutil.walk_packages(lightning_pipelite.__path__, "lightning_pipelite."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = state()
after["loggers"] = {name: found for name, found in after["loggers"].items() if name in before["loggers"]}
changed = [name for name in before if before[name] != after[name]]
print("changed", changed, [(before[name], after[name]) for name in changed])
"""


def test_importing_every_room_changes_nothing() -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "changed [] []"


def _called(tree: ast.Module) -> list[tuple[int, str]]:
    """Return top-level calls whose result is discarded, and assignments to attributes or items."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found.append((node.lineno, ast.unparse(node.value.func)))
        targets = node.targets if isinstance(node, ast.Assign) else []
        found += [
            (node.lineno, ast.unparse(each)) for each in targets if isinstance(each, (ast.Attribute, ast.Subscript))
        ]
    return found


def test_what_modules_do_when_imported_is_written_down() -> None:
    done = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        for line, name in _called(ast.parse(path.read_text()))
        if name not in ALLOWED
    }
    assert done == set()


def test_no_module_reads_the_environment_when_imported_and_none_uses_mocks() -> None:
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            names = ast.unparse(node)
            if "os.environ" in names or "getenv" in names or "unittest" in names:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
