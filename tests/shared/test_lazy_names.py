"""Packages resolve their names on access, and importing one module imports no more than it needs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_pipelite
from lightning_pipelite.shared.lazy_names import lazy_names

ROOT = Path(lightning_pipelite.__file__).parent
PACKAGES = [
    ".".join(file.relative_to(ROOT.parent).parent.parts)
    for file in sorted(ROOT.rglob("__init__.py"))
    if "__getattr__" in file.read_text()
]
HEAVY = ["torch", "lightning", "transformers", "deepspeed", "peft", "bitsandbytes", "triton", "pyarrow"]
TORCH = ["lightning", "transformers", "deepspeed", "peft", "bitsandbytes"]
NEEDED = {  # what importing it must not import
    "lightning_pipelite.data.packing": HEAVY,
    "lightning_pipelite.data.selection": HEAVY,
    "lightning_pipelite.data.records": [name for name in HEAVY if name != "pyarrow"],
    "lightning_pipelite.adapters.selection": HEAVY,
    "lightning_pipelite.export.migration": HEAVY,
    "lightning_pipelite.strategy.partition": [*TORCH, "triton"],
    "lightning_pipelite.checkpoint.reader": TORCH,
    "lightning_pipelite.optim.schedule": TORCH,
    "lightning_pipelite.kernels.lora": TORCH,
    "lightning_pipelite.models.layers": ["lightning", "deepspeed", "peft", "bitsandbytes", "torch._inductor.lowering"],
}


@pytest.mark.parametrize("package", PACKAGES)
def test_all_its_names(package: str) -> None:
    module = importlib.import_module(package)
    typed = [
        alias.name
        for node in ast.parse(Path(str(module.__file__)).read_text()).body
        if isinstance(node, ast.If)
        for line in node.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]
    assert sorted(typed) == sorted(module.__all__)
    for name in module.__all__:
        assert not isinstance(getattr(module, name), ModuleType)
        assert f"{package}.{name}" not in sys.modules, f"importing a module would take the place of {name}"
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'other'"):
        _ = module.other


def test_is_kept_once_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("package")
    module = ModuleType("package.inside")
    module.value = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "package", package)
    monkeypatch.setitem(sys.modules, "package.inside", module)
    assert lazy_names("package", {"value": "inside"})("value") is module.value
    assert vars(package)["value"] is module.value


@pytest.mark.parametrize("module", NEEDED)
def test_imports_no_more_than_it_needs(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.argv[1:]) & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code, *NEEDED[module]], capture_output=True, text=True, check=True, timeout=120
    )
    assert ran.stdout.split() == []
