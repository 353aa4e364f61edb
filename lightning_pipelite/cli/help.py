"""The first two levels of help, without slow imports: all commands, and the options that most users need."""

from __future__ import annotations

HELP_ALL = "--help-all"

_FIT = {
    "fit": "Train a LoRA, Control Adapters or whole weights.",
    "validate": "Evaluate on a configuration's held-out data, without training.",
}

# The options that most users need, in the order in which one thinks of them.
OPTIONS = {
    "--config FILE": "YAML or JSON file with these options; configs/ has one for each kind of training",
    "--model.model_dir DIR": "directory of the base model: config.json, safetensors and tokenizer",
    "--model.adapter CLASS": "what to train: LoRA, ControlAdapter or Full",
    "--model.adapter.init_args.rank N": "rank of a LoRA or a Control Adapter",
    "--model.load_in_4bit true": "keep the base in 4 bits (QLoRA)",
    "--model.lr RATE": "learning rate",
    "--model.schedule NAME": "learning rate schedule: rms_ratio, constant or cosine",
    "--model.warmup_steps N": "warm-up steps of the learning rate, for constant and cosine",
    "--model.activation_memory HOW": "auto, or keep, selective, recompute, offload: less and less memory, more time",
    "--data.datasets LIST": 'training data: \'[{"dataset_path": "texts/*.txt"}]\'',
    "--data.sequence_len N": "tokens per sequence",
    "--data.eval_fraction SHARE": "share of the documents to hold out for evaluation",
    "--data.chat_template T": "alpaca, chatml or a .jinja file, for models without a chat template",
    "--trainer.devices N": "GPUs per host",
    "--trainer.strategy.init_args.pipeline_stages N": "number of stages to split the model into",
    "--trainer.accumulate_grad_batches N": "sequences per step and replica",
    "--trainer.max_epochs N": "maximum number of passes over the data",
    "--trainer.max_steps N": "maximum number of steps",
    "--ckpt_path last": "resume from the newest checkpoint",
    "--overwrite": "start from scratch and replace the results of an earlier run",
}


def overview() -> str:
    """List all commands, one line each."""
    from lightning_pipelite.cli.commands import COMMANDS

    lines = {**_FIT, **{name: command.summary for name, command in COMMANDS.items()}}
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:{width}}  {summary}" for name, summary in lines.items())
    return (
        "usage: pipelite COMMAND [OPTIONS]\n\nPipeline-parallel fine-tuning of Hugging Face causal LMs.\n\n"
        f"{listed}\n\n"
        "pipelite COMMAND --help lists the options of a command. --verbose prints all messages of the libraries, "
        "--version the version."
    )


def short_help(command: str) -> str:
    """Describe the options of fit or validate that most users need."""
    width = 34
    lines = []
    for option, meaning in OPTIONS.items():
        lines.append(
            f"  {option:{width}} {meaning}" if len(option) <= width else f"  {option}\n  {'':{width}} {meaning}"
        )
    listed = "\n".join(lines)
    return (
        f"usage: pipelite {command} --config FILE [OPTIONS]\n\n{_FIT[command]} Options can be given in the file, on "
        f"the command line or in the environment (PIPELITE_{command.upper()}__TRAINER__MAX_STEPS=3).\n\n{listed}\n\n"
        f"pipelite {command} {HELP_ALL} lists all options, --print_config prints the resulting configuration."
    )
