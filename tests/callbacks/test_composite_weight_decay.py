"""Decay and norms against float64 references that form W = B·A, in plain PyTorch and in Lightning."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from optimi import Adam
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipelite.callbacks import AdapterNorms, CompositeWeightDecay
from lightning_pipelite.callbacks.composite_weight_decay import decay_products
from lightning_pipelite.callbacks.support.low_rank import LowRank, chunks, find_low_rank, gram_matrices
from lightning_pipelite.errors import ConfigurationError

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "log_every_n_steps": 1,
}  # fmt: skip


def pair(name: str, rank: int, inner: int, outer: int, scale: float = 1.0, experts: int = 1) -> LowRank:
    a, b = torch.randn(rank * experts, inner), torch.randn(outer, rank * experts)
    return LowRank(name, nn.Parameter(a), nn.Parameter(b), scale, experts)


def products(each: LowRank) -> list[tuple[Tensor, Tensor]]:
    """Return A and B of every expert in float64. PEFT lays out A as [experts, rank, in], B as [out, rank, experts]."""
    a = each.a.detach().double().reshape(each.experts, -1, each.a.shape[1])
    b = each.b.detach().double().reshape(each.b.shape[0], -1, each.experts)
    return [(a[i], b[:, :, i]) for i in range(each.experts)]


def decayed(a: Tensor, b: Tensor, scale: float, rate_a: float, rate_b: float) -> tuple[Tensor, Tensor]:
    """Decay A and B by the gradient of ½‖s·B·A‖² at their old values, with W formed explicitly."""
    w = scale * b @ a
    return a - rate_a * scale * b.T @ w, b - rate_b * scale * w @ a.T


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rates", [(1e-4, 1e-4), (2e-4, 5e-5), (0.0, 1e-4)], ids=str)
def test_decay_and_norms_in_float32(rates: tuple[float, float]) -> None:
    torch.manual_seed(0)
    pairs = [pair(f"layers.{i}.{n}", 4, 32, out, scale) for i in range(3) for n, out, scale in
             (("q", 32, 1.0), ("k", 16, 1.0), ("up", 32, 2.0))]  # fmt: skip
    pairs += [pair(f"layers.{i}.experts.up", 3, 24, 40, 1.0, experts=5) for i in range(2)]
    before = {each.name: products(each) for each in pairs}
    made = chunks(pairs)
    assert sorted(len(chunk.pairs) for chunk in made) == [2, 3, 3, 3]
    for chunk in made:
        lost: list[Tensor] = []
        norms = chunk.norms(*gram_matrices(*chunk.stack()))
        decay_products(chunk, *rates, lost)
        for each, norm, fall in zip(chunk.pairs, norms, lost, strict=True):
            squares = []
            for old, new in zip(before[each.name], products(each), strict=True):
                expected = decayed(*old, each.scale, *rates)
                assert relative(new[0], expected[0]) < 1e-6
                assert relative(new[1], expected[1]) < 1e-6
                squares.append([(each.scale * b @ a).square().sum() for a, b in (old, expected)])
            start, end = (sum(column).sqrt() for column in zip(*squares, strict=True))
            assert abs(norm - start) < 1e-6 * start
            assert abs(fall - (start - end)) < 1e-5 * (start - end)


def test_chunks_are_small_and_views_follow_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_pipelite.callbacks.support.low_rank.CHUNK_BYTES", 2 * 4 * (4 * 8 + 4 * 8))
    pairs = [pair(str(i), 4, 8, 8) for i in range(5)]
    made = chunks(pairs)
    assert [len(chunk.pairs) for chunk in made] == [2, 2, 1]
    assert [len(chunk.pairs) for chunk in chunks([pair("large", 4, 80, 80)])] == [1]
    pairs[0].a.data, pairs[1].b.data = torch.randn(4, 8), torch.randn(8, 4)  # move to other memory
    expected = [decayed(*products(each)[0], 1.0, 1e-3, 1e-3) for each in made[0].pairs]
    decay_products(made[0], 1e-3, 1e-3, None)
    for each, (a, b) in zip(made[0].pairs, expected, strict=True):
        assert relative(each.a, a) < 1e-6
        assert relative(each.b, b) < 1e-6


@pytest.mark.parametrize(("inner", "outer"), [(2048, 1536), (513, 1026), (514, 512)])
def test_long_sums_are_whole(inner: int, outer: int) -> None:
    pairs = [pair(str(i), 3, inner, outer) for i in range(2)]
    (chunk,) = chunks(pairs)
    for each, norm in zip(pairs, chunk.norms(*gram_matrices(*chunk.stack())), strict=True):
        ((a, b),) = products(each)
        assert norm.item() == pytest.approx((b @ a).norm().item(), rel=1e-6)


def test_norms_of_coarse_weights_are_exact() -> None:
    each = pair("0", 4, 32, 16)
    for weight in (each.a, each.b):
        weight.data = weight.data.bfloat16()
    ((a, b),) = products(each)
    (norm,) = chunks([each])[0].norms(*gram_matrices(*chunks([each])[0].stack()))
    assert norm.item() == pytest.approx((b @ a).norm().item(), rel=1e-6)


class Net(L.LightningModule):
    """Two linear layers with LoRA, and a fully trained head."""

    def __init__(self, optimizer: Any = torch.optim.SGD, groups: bool = False, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
        lora = LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": ["0", "2"], **config})
        self.net = inject_adapter_in_model(lora, net)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("4."))
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
        self.optimizer, self.groups = optimizer, groups

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        trained = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        groups: list[dict[str, Any]] = [{"params": list(trained.values())}]
        if self.groups:
            groups = [{"params": [p for n, p in trained.items() if "lora_B" not in n]},
                      {"params": [p for n, p in trained.items() if "lora_B" in n], "lr": 0.3}]  # fmt: skip
        optimizer = self.optimizer(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rows() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(12, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=2)


class Metrics(L.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if len(self.seen) < trainer.global_step:
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module: L.LightningModule, weight_decay: float, **options: Any) -> list[dict[str, float]]:
    metrics = Metrics()
    callbacks = [CompositeWeightDecay(weight_decay), AdapterNorms(), metrics]
    L.Trainer(callbacks=callbacks, max_epochs=1, **{**QUIET, **options}).fit(module, rows())
    return metrics.seen


def fit_plainly(module: Net, weight_decay: float, accumulate: int) -> list[dict[str, float]]:
    """Train the same way in a plain loop, with W formed in float64 for the decay; return each step's metrics."""
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batches, seen = list(rows()), []
    layers = [module.net.get_submodule(name) for name in ("0", "2")]
    for start in range(0, len(batches), accumulate):
        for batch in batches[start : start + accumulate]:
            (module.training_step(batch, 0) / accumulate).backward()
        optimizer.step()
        norms, falls = [], []
        for layer in layers:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            scale = layer.scaling["default"]
            rate_of = {p: g["lr"] * weight_decay for g in optimizer.param_groups for p in g["params"]}
            old = a.detach().double(), b.detach().double()
            new = decayed(*old, scale, rate_of[a], rate_of[b])
            a.data.copy_(new[0])
            b.data.copy_(new[1])
            before, after = (float((scale * y @ x).norm()) for x, y in (old, new))
            norms.append(after)
            falls.append(before - after)
        scheduler.step()
        optimizer.zero_grad()
        found = {"norms": norms, "weight_decay": falls} if weight_decay else {"norms": norms}
        seen.append({f"train/{name}_{kind}": value for name, values in found.items() for kind, value in
                     (("avg", sum(values) / len(values)), ("min", min(values)), ("max", max(values)))})  # fmt: skip
    return seen


@pytest.mark.parametrize(
    ("options", "accumulate", "weight_decay"),
    [
        ({}, 1, 0.5),
        ({}, 3, 0.5),
        ({"groups": True}, 1, 0.5),
        ({"use_rslora": True}, 2, 0.2),
        ({"optimizer": Adam}, 2, 0.5),
        ({"optimizer": torch.optim.AdamW}, 1, 0.0),
    ],
    ids=str,
)
def test_a_training_equals_a_plain_loop(options: dict[str, Any], accumulate: int, weight_decay: float) -> None:
    ours, theirs = Net(**options), Net(**options)
    start = [p.detach().clone() for p in ours.parameters()]
    seen = fit(ours, weight_decay, accumulate_grad_batches=accumulate)
    expected = fit_plainly(theirs, weight_decay, accumulate)
    assert len(seen) == len(expected) == 6 // accumulate
    for found, wanted in zip(seen, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-4), name
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(start, ours.parameters(), strict=True))


def test_only_logged_steps_have_metrics() -> None:
    seen = fit(Net(), 0.5, log_every_n_steps=3)
    assert ["train/norms_avg" in step for step in seen] == [False, False, True, True, True, True]  # metrics persist
    assert seen[2] == seen[3] == seen[4] != seen[5]


def test_a_parameter_that_is_not_trained_keeps_its_value() -> None:
    module = Net()
    frozen = [p for n, p in module.net.named_parameters() if "lora_A" in n]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [p.detach().clone() for p in frozen]
    fit(module, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))


class Controlled(L.LightningModule):
    """Control Adapters: S of the first layer has its own rate, the third's is frozen, the fourth's is unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))
        for layer in self.layers:
            layer.control_Q, layer.control_S = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))
        self.layers[2].control_S.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(((each.control_Q * each.control_S).square().mean() for each in self.layers[:3]), torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first, *others = (layer.control_S for layer in self.layers)
        return torch.optim.SGD([{"params": others}, {"params": [first], "lr": 0.3}], lr=0.1)


def test_control_adapters_decay() -> None:
    module, decay = Controlled(), 0.5
    values = [layer.control_S.detach().double() for layer in module.layers]
    (metrics,) = fit(module, decay, max_steps=1)
    falls = []
    for number, rate in enumerate((0.3, 0.1)):
        q = module.layers[number].control_Q.detach().double()
        stepped = values[number] * (1 - rate * 2 / q.numel() * q.square().sum(0))
        values[number] = stepped * (1 - rate * decay)
        falls.append(float(stepped.expm1().abs().max() - values[number].expm1().abs().max()))
    for layer, value in zip(module.layers, values, strict=True):
        torch.testing.assert_close(layer.control_S.detach().double(), value, rtol=1e-6, atol=1e-6)
    for kind, fall in (("min", min(falls)), ("max", max(falls)), ("avg", sum(falls) / 2)):
        assert metrics[f"train/weight_decay_{kind}"] == pytest.approx(fall, rel=1e-4)


def test_names_of_experts_tell_their_parameter() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))

    module = nn.Sequential(Experts())
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["0.up", "0.down"])
    found = find_low_rank(inject_adapter_in_model(config, module))
    assert sorted((each.name, each.experts) for each in found) == [("0.down", 3), ("0.up", 3)]
    layers = dict(module.named_modules())
    for each in found:
        nn.init.normal_(each.b)
        (chunk,) = chunks([each])
        layer = next(m for m in layers.values() if getattr(m, "parameter_name", None) == each.name[2:])
        delta = layer.get_delta_weight("default").double()
        assert chunk.norms(*gram_matrices(*chunk.stack())).item() == pytest.approx(delta.norm().item(), rel=1e-6)


@pytest.mark.parametrize("weight_decay", [-1.0, float("nan")])
def test_negative_decay(weight_decay: float) -> None:
    with pytest.raises(ConfigurationError, match="weight_decay"):
        CompositeWeightDecay(weight_decay)


def test_coarse_adapters_are_refused_only_where_something_decays() -> None:
    module = Net()
    for layer in find_low_rank(module):
        layer.a.data = layer.a.data.bfloat16()
    with pytest.raises(ConfigurationError, match=r"bfloat16.*float32"):
        fit(module, 1.0)
    fit(module.to(torch.bfloat16), 0.0, precision="bf16-true")


def test_a_module_without_adapters() -> None:
    class Bare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 2)

    with pytest.raises(ConfigurationError, match="neither PEFT LoRA layers nor Control Adapters"):
        fit(Bare(), 1.0)
