"""AdapterNorms and CompositeWeightDecay with more of PEFT and Lightning than one LoRA and one optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from test_composite_weight_decay import decayed
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_pipelite.callbacks import AdapterNorms, CompositeWeightDecay
from lightning_pipelite.callbacks.support.low_rank import LowRank, chunks, find_low_rank, gram_matrices
from lightning_pipelite.errors import ConfigurationError
from projects import QUIET, Project, loader

RATE, DECAY = 0.1, 0.5


class Adapted(Project):
    """A project with LoRAs on an embedding, a Linear and GPT-2's Conv1D.

    Args:
        configs: LoRA options, one set per adapter.
        optimizer: Called with all parameters, including frozen ones, and the learning rate.
    """

    def __init__(self, *configs: dict[str, Any], optimizer: Any = torch.optim.SGD) -> None:
        super().__init__()
        net: Any = nn.Sequential(nn.Embedding(7, 8), Conv1D(6, 8), nn.Tanh(), nn.Linear(6, 2))
        self.names = ["default", "second"][: len(configs)]
        for name, config in zip(self.names, configs, strict=True):
            lora = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["0", "1", "3"], **config})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net = inject_adapter_in_model(lora, net, adapter_name=name)
        self.layers = net
        for layer in net:
            if hasattr(layer, "set_adapter"):
                layer.set_adapter("default")
        for name, parameter in net.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                nn.init.normal_(parameter, std=0.5)
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0].abs().long() % 7).mean(1), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(list(self.layers.parameters()), lr=RATE)  # including frozen ones

    def products(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return A, B and the scale of each adapter, read by PEFT's own names."""
        found = {}
        for name, layer in self.layers.named_children():
            for adapter in self.names if hasattr(layer, "scaling") else []:
                embeds = adapter in layer.lora_embedding_A
                a = layer.lora_embedding_A[adapter] if embeds else layer.lora_A[adapter].weight
                b = layer.lora_embedding_B[adapter] if embeds else layer.lora_B[adapter].weight
                found[f"{name} {adapter}"] = a.detach().double(), b.detach().double(), layer.scaling[adapter]
        return found


class Before(L.Callback):
    """Records the A and B that the last step would give without decay."""

    def __init__(self) -> None:
        self.products: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        """Take SGD's step, record A and B, and undo the step."""
        after = {p: p.detach() - RATE * p.grad for p in module.parameters() if p.grad is not None}
        kept = {p: p.detach().clone() for p in after}
        for p, value in after.items():
            p.data.copy_(value)
        self.products = {name: (a.clone(), b.clone(), s) for name, (a, b, s) in module.products().items()}
        for p, value in kept.items():
            p.data.copy_(value)


def one_step(module: Adapted, *callbacks: L.Callback) -> dict[str, float]:
    trainer = L.Trainer(callbacks=[*callbacks], **{**QUIET, "max_steps": 1, "log_every_n_steps": 1})
    trainer.fit(module, loader())
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


@pytest.mark.parametrize(
    "configs",
    [({},), ({"use_rslora": True},), ({"use_dora": True, "target_modules": ["1", "3"]},), ({}, {"r": 3})],
    ids=["lora", "rslora", "dora", "two adapters"],
)
@pytest.mark.parametrize("idle", ["frozen", "without a gradient"])
def test_one_step(configs: Any, idle: str) -> None:
    """Of two adapters on a layer, the active one decays and the idle one does not; both have norms."""
    module, before = Adapted(*configs), Before()
    for name, parameter in module.layers.named_parameters():
        if "second" in name:
            parameter.requires_grad_(idle != "frozen")
    metrics = one_step(module, before, CompositeWeightDecay(DECAY), AdapterNorms())
    norms, falls = [], []
    after = module.products()
    for name, (a, b, scale) in before.products.items():
        expected = (a, b) if "second" in name else decayed(a, b, scale, RATE * DECAY, RATE * DECAY)
        for found, wanted in zip(after[name][:2], expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
        norms.append(float((scale * expected[1] @ expected[0]).norm()))
        if "second" not in name:
            falls.append(float((scale * b @ a).norm()) - norms[-1])
    assert len(norms) == len(configs) * len(configs[0].get("target_modules", "abc"))
    for kind, values in (("norms", norms), ("weight_decay", falls)):
        assert metrics[f"train/{kind}_min"] == pytest.approx(min(values), rel=1e-5)
        assert metrics[f"train/{kind}_max"] == pytest.approx(max(values), rel=1e-5)
        assert metrics[f"train/{kind}_avg"] == pytest.approx(sum(values) / len(values), rel=1e-5)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_one_half_decays_where_the_other_is_frozen(frozen: str) -> None:
    module, before = Adapted({}), Before()
    for name, parameter in module.layers.named_parameters():
        if f"_{frozen}" in name:
            parameter.requires_grad_(False)
    one_step(module, before, CompositeWeightDecay(DECAY))
    rates = [0.0 if each == frozen else RATE * DECAY for each in "AB"]
    for name, (a, b, scale) in before.products.items():
        for found, wanted in zip(module.products()[name][:2], decayed(a, b, scale, *rates), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


class CallsItsBase(torch.optim.SGD):
    """An optimizer whose own step and whose base class's step both call the hooks."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class LetsGo(torch.optim.Optimizer):
    """SGD that has released the gradients before hooks are called, as memory-saving optimizers do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data -= self.param_groups[0]["lr"] * parameter.grad
                parameter.grad = None
        return loss


@pytest.mark.parametrize("optimizer", [CallsItsBase, LetsGo])
def test_an_optimizer_of_another_kind_decays_the_same_and_once(optimizer: Any) -> None:
    module, same = Adapted({}, {"r": 3}, optimizer=optimizer), Adapted({}, {"r": 3})
    same.load_state_dict(module.state_dict())
    for each in (module, same):  # the second adapter of each is frozen
        one_step(each, CompositeWeightDecay(DECAY))
    for ours, theirs in zip(module.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_optimizers_decay_and_log_as_one() -> None:
    class Two(Adapted):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [self.optimizer(part.parameters(), lr=RATE) for part in (self.layers[:2], self.layers[2:])]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

    module, same = Two({}), Adapted({})
    same.load_state_dict(module.state_dict())
    options = {**QUIET, "max_epochs": 1, "limit_train_batches": 1, "log_every_n_steps": 1}
    logged = []
    for each in (module, same):
        trainer = L.Trainer(callbacks=[CompositeWeightDecay(DECAY)], **options)
        trainer.fit(each, loader())
        logged.append({name: float(value) for name, value in trainer.logged_metrics.items() if "decay" in name})
    assert logged[0] == pytest.approx(logged[1])
    assert len(logged[0]) == 3
    for ours, theirs in zip(module.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norms_are_those_of_peft() -> None:
    module = Adapted({}, {"r": 3, "use_rslora": True})
    found = {each.name: each for each in find_low_rank(module.layers)}
    assert found.keys() == {f"{layer} ({adapter})" for layer in "013" for adapter in ("default", "second")}
    for name, each in found.items():
        (chunk,) = chunks([each])
        layer = module.layers.get_submodule(name[0])
        delta = layer.get_delta_weight(name[3:-1]).double()
        assert chunk.norms(*gram_matrices(*chunk.stack())).item() == pytest.approx(delta.norm().item(), rel=1e-6)


@pytest.mark.parametrize("callback", [AdapterNorms(), CompositeWeightDecay(1.0)], ids=lambda each: type(each).__name__)
def test_more_than_a_product_is_refused_before_the_first_step(callback: L.Callback) -> None:
    from peft import MontecloraConfig

    module = Adapted({"target_modules": ["3"], "monteclora_config": MontecloraConfig()})
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ConfigurationError, match="is a MontecloraLinear, which is more than the product"):
        one_step(module, callback)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("what", ["convolution", "flat", "other rank"])
def test_what_is_no_whole_matrix_is_refused(what: str) -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 2) if what == "convolution" else nn.Linear(3, 4))
    layer = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), net)[0]
    weight = layer.lora_B["default"].weight
    if what == "flat":  # as some strategies store shards
        weight.data = weight.data.flatten()
    elif what == "other rank":
        weight.data = weight.data[:, :1]
    with pytest.raises(ConfigurationError, match=r"LoRA weights of 0 have shapes .*plain, unsharded matrices"):
        find_low_rank(net)


def test_norms_of_nothing_are_told_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = L.Trainer(callbacks=[AdapterNorms()], **{**QUIET, "log_every_n_steps": 1})
        trainer.fit(Project(), loader())
    told = [str(each.message) for each in caught if "AdapterNorms" in str(each.message)]
    assert told == [
        "AdapterNorms: the model has neither PEFT LoRA layers nor Control Adapters, so there are no norms to log."
    ]
    assert not any("norms" in name for name in trainer.callback_metrics)


def test_an_optimizer_without_a_rate_is_refused() -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> Any:
            return closure()

    with pytest.raises(ConfigurationError, match="Rateless has no learning rate"):
        one_step(Adapted({}, optimizer=Rateless), CompositeWeightDecay(1.0))


def test_a_rate_that_is_a_tensor() -> None:
    def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=torch.tensor(lr))

    module, same = Adapted({}, optimizer=adam), Adapted({}, optimizer=torch.optim.Adam)
    for each in (module, same):
        one_step(each, CompositeWeightDecay(DECAY))
    for ours, theirs in zip(module.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_thawed_or_added_later_decays_from_then_on() -> None:
    """The second layer's adapter joins the optimizer in the second epoch; the third's is unfrozen in the third."""

    class Later(Adapted):
        def configure_optimizers(self) -> Any:
            self.layers[3].requires_grad_(False)
            later = {id(p) for p in self.layers[1].parameters()}
            return torch.optim.SGD([p for p in self.layers.parameters() if id(p) not in later], lr=RATE)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                optimizer: Any = self.optimizers()
                optimizer.add_param_group({"params": [*self.layers[1].parameters()], "lr": RATE})
            if self.current_epoch == 2:
                for name, parameter in self.layers[3].named_parameters():
                    parameter.requires_grad_("lora_" in name)

    fallen: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            fallen.append(sum(group != -1 for (group, _), _ in decay._plan_of(trainer.optimizers[0])[0]))

    decay = CompositeWeightDecay(1.0)
    options = {**QUIET, "limit_train_batches": 1, "max_epochs": 3}
    L.Trainer(callbacks=[decay, Count()], **options).fit(Later({}), loader())
    assert fallen == [1, 2, 3]


def test_after_an_error_nothing_decays_twice() -> None:
    """Both fits use the same optimizer, on which a hook left by the failed one would decay again."""

    class Keeps(Adapted):
        def configure_optimizers(self) -> Any:
            self.kept = getattr(self, "kept", None) or super().configure_optimizers()
            return self.kept

    class Fail(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    module, decay = Keeps({}), CompositeWeightDecay(DECAY)
    with pytest.raises(ZeroDivisionError):
        one_step(module, decay, Fail())
    assert not decay._hooks
    assert not module.kept._optimizer_step_post_hooks
    one_step(module, decay)
    same = Keeps({})
    for _ in range(2):
        one_step(same, CompositeWeightDecay(DECAY))
    torch.testing.assert_close(module.state_dict(), same.state_dict(), atol=0, rtol=0)


def test_pairs_of_other_shapes_are_apart() -> None:
    pairs = [
        LowRank(str(i), nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(3, 2)), s)
        for i, s in enumerate((1.0, 2.0))
    ]
    assert [len(chunk.pairs) for chunk in chunks(pairs)] == [1, 1]
