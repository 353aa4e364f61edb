"""Wrong inputs of the commands other than fit and validate."""

from __future__ import annotations

from wrong_input import Case, copied, file, removed, replaced, truncated, written

CASES = {
    # merge
    "nothing to merge": Case("base, adapter, output must be given on the command line.", command=["merge"]),
    "unknown option of merge": Case("--bass is not an option; did you mean --base?", command=["merge", "--bass", "x"]),
    "no adapter there": Case(
        "none has no adapter_config.json; give the directory of a PEFT adapter.",
        command=["merge", "--base", "{job}/model", "--adapter", "none", "--output", "out"],
    ),
    "no base there": Case(
        "none is not a directory; give the directory of a local Hugging Face model.",
        command=["merge", "--base", "none", "--adapter", "{job}/adapter", "--output", "out"],
    ),
    "Control Adapter to merge": Case(
        "{job}/control is an adapter of type CONTROL_ADAPTER, not a LoRA; choose a LoRA.",
        command=["merge", "--base", "{job}/model", "--adapter", "{job}/control", "--output", "out"],
    ),
    "merge over a file": Case(
        "{here}/config.yaml exists and is not a plain directory; choose another place to save to.",
        command=["merge", "--base", "{job}/model", "--adapter", "{job}/adapter", "--output", "config.yaml"],
    ),
    "merge over something else": Case(
        "out is not empty; choose a new directory for the output.",
        command=["merge", "--base", "{job}/model", "--adapter", "{job}/adapter", "--output", "out"],
        prepare=file("out/thesis.tex", "Of the years of my life"),
    ),
    "merge over the base": Case(
        "output {job}/model and input {job}/model overlap; choose another place for the output.",
        command=["merge", "--base", "{job}/model", "--adapter", "{job}/adapter", "--output", "{job}/model"],
    ),
    "scale out of range": Case(
        "scale must be greater than -2 and less than 2, not 9.",
        command=["merge", "--base", "{job}/model", "--adapter", "{job}/adapter", "--output", "out", "--scale", "9"],
    ),
    "two scales for one adapter": Case(
        "the number of scales is 2, but that of adapters is 1; give one scale for each adapter.",
        command=[
            "merge",
            "--base",
            "{job}/model",
            "--adapter",
            "{job}/adapter",
            "--output",
            "out",
            "--scale",
            "[1.0,1.0]",
        ],
    ),
    "device that is not there": Case(
        "device gpu cannot be used (Expected one of cpu, cuda",
        command=["merge", "--base", "{job}/model", "--adapter", "{job}/adapter", "--output", "out", "--device", "gpu"],
    ),
    "damaged adapter_config.json": Case(
        "copy/adapter_config.json cannot be read as JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); fetch the file again.",
        command=["merge", "--base", "{job}/model", "--adapter", "copy", "--output", "out"],
        prepare=copied("adapter", written("adapter_config.json", "{")),
    ),
    "adapter without weights": Case(
        "copy has no adapter_model.safetensors; give the directory of an adapter.",
        command=["merge", "--base", "{job}/model", "--adapter", "copy", "--output", "out"],
        prepare=copied("adapter", removed("*.safetensors")),
    ),
    "adapter cut short": Case(
        "copy cannot be read (Error while deserializing header: incomplete metadata, file not fully covered); fetch it again.",
        command=["merge", "--base", "{job}/model", "--adapter", "copy", "--output", "out"],
        prepare=copied("adapter", truncated("*.safetensors")),
    ),
    "adapter of another kind": Case(
        "copy is an adapter of type IA3, not a LoRA; choose a LoRA.",
        command=["merge", "--base", "{job}/model", "--adapter", "copy", "--output", "out"],
        prepare=copied("adapter", replaced("adapter_config.json", '"LORA"', '"IA3"')),
    ),
    "adapter of another rank": Case(
        "copy does not fit {job}/model: size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight: copying a param with shape torch.Size([2, 64]) from checkpoint, the shape in current model is torch.Size([4, 64]).",
        command=["merge", "--base", "{job}/model", "--adapter", "copy", "--output", "out"],
        prepare=copied("adapter", replaced("adapter_config.json", '"r": 2', '"r": 4')),
    ),
    # convert
    "no checkpoint to convert": Case(
        "--checkpoint: none is not a directory; give the directory of a checkpoint.",
        command=["convert", "--checkpoint", "none", "--output", "out"],
    ),
    "model to convert": Case(
        "--checkpoint: {job}/model is not a checkpoint (a directory with manifest.json); name another checkpoint.",
        command=["convert", "--checkpoint", "{job}/model", "--output", "out"],
    ),
    "damaged checkpoint to convert": Case(
        "--checkpoint: stage-00.safetensors of copy has 109600 bytes, not 109700; name another checkpoint.",
        command=["convert", "--checkpoint", "copy", "--output", "out"],
        prepare=copied("adapter-checkpoint", truncated("stage-00.safetensors")),
    ),
    "no configuration to convert with": Case(
        "none.yaml does not exist; give the configuration used for training.",
        command=["convert", "--checkpoint", "{job}/adapter-checkpoint", "--output", "out", "--config", "none.yaml"],
    ),
    # control-to-lora, export-gguf, analyze
    "LoRA for a Control Adapter": Case(
        "{job}/adapter holds base_model.model.model.layers.0.mlp.down_proj.lora_A.weight, which is not part of a Control Adapter; give the directory of one.",
        command=["control-to-lora", "--base", "{job}/model", "--adapter", "{job}/adapter", "--output", "out"],
    ),
    "unknown writers": Case(
        "writers must be one of 'nearer', 'last', 'all', not some.",
        command=[
            "control-to-lora",
            "--base",
            "{job}/model",
            "--adapter",
            "{job}/control",
            "--output",
            "out",
            "--writers",
            "some",
        ],
    ),
    "unknown type of GGUF": Case(
        "outtype must be one of 'f32', 'f16', 'bf16', 'q8_0', not q4.",
        command=[
            "export-gguf",
            "--base",
            "{job}/model",
            "--adapter",
            "{job}/adapter",
            "--output",
            "o.gguf",
            "--outtype",
            "q4",
        ],
    ),
    "GGUF over a file": Case(
        "config.yaml exists; choose a new file for the output.",
        command=["export-gguf", "--base", "{job}/model", "--adapter", "{job}/adapter", "--output", "config.yaml"],
    ),
    "no adapter for GGUF": Case(
        "none has no adapter_config.json; give the directory of an adapter.",
        command=["export-gguf", "--base", "{job}/model", "--adapter", "none", "--output", "o.gguf"],
    ),
    "inverse of a LoRA": Case(
        "{job}/adapter is not a Control Adapter, so there is no class -1; leave inverse out.",
        command=[
            "export-gguf",
            "--base",
            "{job}/model",
            "--adapter",
            "{job}/adapter",
            "--output",
            "o.gguf",
            "--inverse",
        ],
    ),
    "model to analyze": Case(
        "{job}/model has no adapter_config.json; give the directory of an adapter.",
        command=["analyze", "--adapter", "{job}/model"],
    ),
    "adapter for a base": Case(
        "{job}/adapter also holds an adapter_config.json; move that adapter elsewhere.",
        command=["analyze", "--adapter", "{job}/adapter", "--base", "{job}/adapter", "--output", "out"],
    ),
    # migrate, preview, check
    "no file to migrate": Case(
        "none.toml cannot be read as TOML ([Errno 2] No such file or directory: 'none.toml'); give a configuration of qlora-pipe-lite.",
        command=["migrate", "none.toml"],
    ),
    "invalid TOML": Case(
        "a.toml cannot be read as TOML (Invalid value (at end of document)); give a configuration of qlora-pipe-lite.",
        command=["migrate", "a.toml"],
        prepare=file("a.toml", "x = ["),
    ),
    "incomplete TOML": Case(
        "a.toml has no output_dir; add it.", command=["migrate", "a.toml"], prepare=file("a.toml", 'model_dir = "x"')
    ),
    "no configuration to preview": Case(
        "there is no configuration file none.yaml; give the one used for pipelite fit.",
        command=["preview", "--config", "none.yaml"],
    ),
    "no data to preview": Case(
        "data must be given in a.yaml; set it as for pipelite fit.",
        command=["preview", "--config", "a.yaml"],
        prepare=file("a.yaml", "model: {}"),
    ),
    "no sequence to preview": Case(
        "sequences is 0: give a positive number.", command=["preview", "--config", "config.yaml", "--sequences", "0"]
    ),
    "no model to check": Case(
        "none is not a directory; model_dir must name a local Hugging Face model.", command=["check", "none"]
    ),
    "stages in words": Case(
        "stages must be comma-separated integers, not 'two'.",
        command=["check", "{job}/model", "--stages", "two"],
    ),
    "more stages to check than layers": Case(
        "stages: 9 is not between 1 and 4, the most pieces that {job}/model can be split into.",
        command=["check", "{job}/model", "--stages", "9"],
    ),
}
