from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_composite_weight_decay import QUIET, Net, rows

from lightning_pipelite.callbacks import AdapterNorms
from lightning_pipelite.callbacks.support.control_decay import find_control, orthogonality, spectral_norm
from lightning_pipelite.callbacks.support.heat_map import HEIGHT, MISSING, WIDTH, heat_map
from lightning_pipelite.shared.over_ranks import summarize
from processes import Workers


def test_norms_of_control_adapters() -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    torch.manual_seed(0)
    q, s = torch.linalg.qr(torch.randn(9, 3))[0] + 0.1 * torch.randn(9, 3), torch.tensor([0.3, -0.9, 0.1])
    module[1].control_Q, module[1].control_S = torch.nn.Parameter(q), torch.nn.Parameter(s)
    (pair,) = find_control(module)
    assert pair.name == "1"
    exact = q.double()
    expected = (exact.T @ exact - torch.eye(3)).norm() ** 2
    assert orthogonality(pair).item() == pytest.approx(expected.item(), rel=1e-6)
    pair.q.data = q.bfloat16()
    exact = q.bfloat16().double()
    expected = (exact.T @ exact - torch.eye(3)).norm() ** 2
    assert orthogonality(pair).item() == pytest.approx(expected.item(), rel=1e-5)
    pair.q.data = torch.linalg.qr(q)[0]
    w = pair.q.detach().double() @ torch.diag(s.double().exp() - 1) @ pair.q.detach().double().T
    assert spectral_norm(pair).item() == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=1e-6)
    assert spectral_norm(pair).item() == pytest.approx(s.double().expm1().abs().max().item(), rel=1e-14)  # not rounded


def test_layers_are_shown_now_and_then(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer = L.Trainer(callbacks=[AdapterNorms()], max_steps=12, max_epochs=-1, **{**QUIET, "logger": logger})
    module = Net()
    trainer.fit(module, rows())
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "images": 0}).Reload()
    steps = [event.step for event in events.Histograms("train/norms_by_layer")]
    assert steps == [1, 11]
    assert [event.step for event in events.Images("train/norms_map")] == steps
    assert events.Images("train/norms_map")[0].width == 2 * WIDTH  # the layer numbers, and one unnamed module
    shown = events.Histograms("train/norms_by_layer")[-1].histogram_value
    logged = {name: events.Scalars(f"train/norms_{name}")[10].value for name in ("min", "max", "avg")}
    assert (shown.min, shown.max) == pytest.approx((logged["min"], logged["max"]))
    assert shown.sum / shown.num == pytest.approx(logged["avg"])


def test_heat_map() -> None:
    picture = heat_map({"m.layers.2.q_proj": 1.0, "m.layers.10.q_proj": 0.5, "m.layers.10.mlp.up_proj": 0.0})
    assert picture.shape == (3 * HEIGHT, 3 * WIDTH, 3)

    def cell(row: int, column: int) -> tuple[int, ...]:
        return tuple(picture[row * HEIGHT + HEIGHT // 2, column * WIDTH + WIDTH // 2])

    assert cell(1, 1) == (255, 255, 255)  # layer 2 before layer 10
    assert cell(1, 2) == MISSING
    assert cell(2, 1) == (255, 128, 0)
    assert cell(2, 2) == (0, 0, 0)
    assert picture.dtype == np.uint8


def test_labels_of_a_heat_map_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each label, and the number in the corner, ends before the next begins; labels of similar modules differ."""
    drawn: list[tuple[float, float, str]] = []

    def text(draw: ImageDraw.ImageDraw, at: tuple[float, float], label: str, **options: Any) -> None:
        drawn.append((at[0], at[0] + options["font"].getlength(label), label))

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    parts = [
        "self_attn.q_proj",
        "linear_attn.in_proj_qkvz",
        "mlp.up_proj",
        "mlp.shared_expert.up_proj",
        "mlp.experts.up",
    ]
    picture = heat_map({f"model.layers.{layer}.{part}": 1234.5 for layer in range(2) for part in parts})
    heading = drawn[: len(parts) + 1]
    assert [label for *_, label in heading] == [
        "to 1.2e+03",
        "q",
        "in_proj_qkvz",
        "mlp.up",
        "shared_expert.up",
        "experts.up",
    ]
    ends = [left for left, *_ in heading[1:]] + [picture.shape[1]]
    assert all(right < end for (_, right, _), end in zip(heading, ends, strict=True))


def summaries() -> list[Any]:
    """Summarise three quantities over two ranks: one on both ranks, one on neither, and one on a single rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    values = {"a": [torch.tensor(v) for v in ([1.0, 5.0] if dist.get_rank() == 0 else [-3.0])], "b": [], "c": []}
    if dist.get_rank() == 1:
        values["c"] = [torch.tensor(2.0)]
    return [summarize(values, torch.device("cpu"))]


def test_statistics_over_ranks(workers: Workers) -> None:
    expected = {"a_avg": 1.0, "a_min": -3.0, "a_max": 5.0, "c_avg": 2.0, "c_min": 2.0, "c_max": 2.0}
    assert workers.run(2, summaries) == [[expected], [expected]]


def run_example(arguments: list[str]) -> str:
    """Run examples/callbacks_ddp.py as one of the ranks; return what it printed."""
    import contextlib
    import io
    import sys

    import callbacks_ddp

    sys.argv = ["callbacks_ddp.py", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        callbacks_ddp.main()
    return printed.getvalue()


def test_the_ddp_example(workers: Workers) -> None:
    first, second = workers.run(2, run_example, ["--devices", "2", "--steps", "20"])
    assert [line.split(":")[0] for line in first.splitlines() if "norms_avg" in line][-1] == "step 20"
    assert "train/weight_decay_avg" in first
    assert "norms_avg" not in second
