from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, LlamaConfig, MambaConfig, OPTConfig, RobertaConfig

from lightning_pipelite.cli import check_command
from lightning_pipelite.cli.check_command import check, check_model
from lightning_pipelite.errors import ConfigurationError
from lightning_pipelite.models import Stage
from published_bases import PUBLISHED, shallow
from tiny_models import SIZES, write_model


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_sound_model(tmp_path: Path, kind: str) -> None:
    report = check_model(write_model(tmp_path, kind), stages=(1, 2, 4))
    assert report.differences == []
    assert report.packing
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert [*report.stage_bytes] == [1, 2, 4]
    for count, sizes in report.stage_bytes.items():
        assert len(sizes) == count
        ties = 2 * 128 * 64 if kind == "gemma3" and count > 1 else 0  # both ends hold the tied embedding
        # Float32 on disk, with a header; bfloat16 in the report.
        assert (weights / 2) * 0.9 < sum(sizes) - ties < weights / 2
    assert "agree" in str(report)


def test_pieces_of_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check(str(write_model(tmp_path, "gemma3")), stages="2,2x2")
    assert report.differences == []
    assert sum(report.stage_bytes[2, 2]) == sum(report.stage_bytes[2])
    assert "2 stages of 2 pieces: " in str(report)
    for stages, message in (
        ("1x2", "needs pipeline_stages of 2 or more"),
        ("2x3", "stages: 6"),
        ("2x", "stages must be comma-separated integers"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check(str(tmp_path), stages=stages)


def test_a_model_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that would not fit is refused before it is loaded, which would fail here because there are no weights."""
    LlamaConfig(num_hidden_layers=6, vocab_size=1000, hidden_size=256, intermediate_size=512).save_pretrained(tmp_path)
    monkeypatch.setattr(check_command.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(
        ConfigurationError, match=r"would take about [\d.]+ MiB .* but only 1.0 MiB is free; give --tiny"
    ):
        check_model(tmp_path, stages=(2,))
    assert check_model(tmp_path, stages=(2,), tiny=True).differences == []


def test_one_stage_is_one_stage(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=64, vocab_size=99).save_pretrained(tmp_path)
    text = str(check_model(tmp_path, stages=(1, 2), tiny=True))
    assert "1 stage: " in text
    assert "2 stages: " in text


def test_tiny_needs_the_configuration_alone(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=6).save_pretrained(tmp_path)
    report = check_model(tmp_path, stages=(3,), tiny=True)
    assert report.differences == []
    assert sum(report.stage_bytes[3]) > 2e9  # sizes of the real model, not of the tiny one


def test_rounding_of_many_layers_is_no_difference(tmp_path: Path) -> None:
    """With packed documents, rounding alone makes ten layers of Gemma 3n differ by more than 1e-5 in float32."""
    facts = {n: value for n, value in shallow(PUBLISHED["Gemma 3n E4B"], 10).items() if n != "model_type"}
    Gemma3nTextConfig(**facts).save_pretrained(tmp_path)
    report = check_model(tmp_path, (2,), tiny=True)
    assert (report.differences, report.packing) == ([], True)


def test_an_embedding_of_another_width_than_the_layers(tmp_path: Path) -> None:
    OPTConfig(word_embed_proj_dim=512, num_hidden_layers=2, do_layer_norm_before=False).save_pretrained(tmp_path)
    assert check_model(tmp_path, stages=(2,), tiny=True).differences == []


def test_recurrent_model_is_exact_packed(tmp_path: Path) -> None:
    MambaConfig(num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path)
    report = check_model(tmp_path, stages=(2,), tiny=True)
    assert report.differences == []
    assert report.packing


def test_model_that_counts_positions_itself_is_exact_unpacked(tmp_path: Path) -> None:
    RobertaConfig(is_decoder=True, num_hidden_layers=2).save_pretrained(tmp_path)
    report = check_model(tmp_path, stages=(2,), tiny=True)
    assert report.differences == []
    assert "packed to false" in str(report)


def test_a_stage_that_computes_something_else_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, "llama")
    whole = Stage.forward

    def wrong(self: Stage, inputs: tuple[torch.Tensor, ...]) -> object:
        output = whole(self, inputs)
        return output * 1.001 if isinstance(output, torch.Tensor) else output

    monkeypatch.setattr(Stage, "forward", wrong)
    assert any("logits" in line for line in check_model(tmp_path, stages=(2,)).differences)


def test_more_stages_than_layers(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="stages: 5"):
        check_model(write_model(tmp_path, "llama"), stages=(5,))


def test_what_stands_around_the_weights_does_not_matter(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "a [b]*? ü" / "org" / "name.safetensors", "llama", max_shard_size="100KB")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for shard in list(directory.glob("*.safetensors")):  # laid out as in the Hugging Face cache
        shard.rename(blobs / shard.stem)
        shard.symlink_to(blobs / shard.stem)
    assert check_model(directory, stages=(2,)).differences == []
    (directory / "generation_config.json").write_text("{")
    assert check_model(directory, stages=(2,)).differences == []


@pytest.mark.parametrize("tied", [False, True])
def test_one_layer(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    report = check_model(tmp_path, stages=(1,))
    assert report.differences == []
    assert report.packing
