"""Learns a style with Control Adapters, from three small text files to a GGUF file.

    python examples/control_style.py BASE_MODEL [--output DIRECTORY] [--steps N] [fit options]

examples/style/more.txt is written as the model should write (class +1), less.txt as it should not (class -1). The
records of neutral.jsonl are class 0: about half of them count as each class, so that whatever is not style stays
unchanged. For a real model, use your own texts, as long as books rather than pages. The adapter is trained with
`pipelite fit`, converted to two LoRAs (the second removes the style), analysed as with `pipelite analyze`, and exported
for llama.cpp:

    llama-cli --model base.gguf --lora style.gguf
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from lightning_pipelite.export import analyze, control_to_lora, export_gguf

TEXTS = Path(__file__).resolve().parent / "style"


def configuration(base: str, output: Path, steps: int) -> dict[str, object]:
    """Return the configuration for `pipelite fit`."""
    return {
        "trainer": {
            "max_steps": steps,
            "accumulate_grad_batches": 3,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "lightning_pipelite.callbacks.CompositeWeightDecay", "init_args": {"weight_decay": 1.0}},
                {
                    "class_path": "lightning_pipelite.callbacks.SaveTrained",
                    "init_args": {"output_dir": str(output / "control_adapter")},
                },
            ],
            "logger": False,
            "enable_checkpointing": False,
        },
        "model": {
            "model_dir": base,
            "adapter": {"class_path": "lightning_pipelite.adapters.ControlAdapter", "init_args": {"rank": 8}},
            "lr": 1e-3,
        },
        "data": {
            "datasets": [
                {"dataset_path": str(TEXTS / "more.txt"), "control_class": 1},
                {"dataset_path": str(TEXTS / "less.txt"), "control_class": -1},
                {"dataset_path": str(TEXTS / "neutral.jsonl"), "control_class": 0},
            ],
            "sequence_len": 512,
            "eval_fraction": 0.0,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="directory of a Hugging Face causal LM")
    parser.add_argument("--output", type=Path, default="output/style")
    parser.add_argument("--steps", type=int, default=30)
    arguments, fit_options = parser.parse_known_args()
    output: Path = arguments.output
    output.mkdir(parents=True)
    written = output / "style.yaml"
    written.write_text(yaml.safe_dump(configuration(arguments.base, output, arguments.steps), sort_keys=False))
    subprocess.run([sys.executable, "-m", "lightning_pipelite", "fit", "--config", written, *fit_options], check=True)
    base, adapter = arguments.base, str(output / "control_adapter")
    # Each of these is also a command of that name: pipelite control-to-lora --base DIR --adapter DIR --output DIR
    print(control_to_lora(base, adapter, str(output / "lora")))
    print(control_to_lora(base, adapter, str(output / "lora_inverse"), inverse=True))
    print(analyze(adapter, base, str(output / "analysis")))
    print(export_gguf(adapter, base, str(output / "style.gguf")))
    print(f"\n{output}: style.gguf for llama.cpp, lora and lora_inverse for PEFT, analysis/analysis.html to look at")


if __name__ == "__main__":
    main()
