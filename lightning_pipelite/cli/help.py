"""The first two levels of help, without slow imports: all commands, and the options that most users need."""

from __future__ import annotations

HELP_ALL = "--help-all"

_FIT = {
    "fit": "Train: a LoRA, Control Adapters or whole weights.",
    "validate": "Evaluate what a configuration holds out, without training.",
}

# The options that most users need, in the order in which one thinks of them.
OPTIONS = {
    "--config FILE": "a YAML or JSON file of these options; configs/ has one for each kind of training",
    "--model.model_dir DIR": "the base model: config.json, safetensors and tokenizer",
    "--model.adapter CLASS": "what is trained: LoRA, ControlAdapter or Full",
    "--model.adapter.init_args.rank N": "rank of a LoRA or a Control Adapter",
    "--model.load_in_4bit true": "keep the base in 4 bits (QLoRA)",
    "--model.lr RATE": "learning rate",
    "--model.schedule NAME": "its course: rms_ratio, constant or cosine",
    "--model.warmup_steps N": "steps of its rise, for constant and cosine",
    "--model.activation_memory HOW": "auto, or what is kept: keep, ..., offload; less memory, more time",
    "--data.datasets LIST": 'the texts: \'[{"dataset_path": "texts/*.txt"}]\'',
    "--data.sequence_len N": "tokens of a sequence",
    "--data.eval_fraction SHARE": "of the documents, held out to evaluate on",
    "--data.chat_template T": "alpaca, chatml or a .jinja file, for models that have none",
    "--trainer.devices N": "GPUs (of each host)",
    "--trainer.strategy.init_args.pipeline_stages N": "stages that the model is cut into",
    "--trainer.accumulate_grad_batches N": "sequences a step (of each replica)",
    "--trainer.max_epochs N": "passes through the data",
    "--trainer.max_steps N": "steps, to stop earlier",
    "--ckpt_path last": "go on with the newest checkpoint",
    "--overwrite": "begin anew over an earlier result",
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
        "pipelite COMMAND --help tells the options of one. --verbose prints all that the libraries say, --version the "
        "version."
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
        f"usage: pipelite {command} --config FILE [OPTIONS]\n\n{_FIT[command]} Options stand in the file, here, or in "
        f"the environment (PIPELITE_{command.upper()}__TRAINER__MAX_STEPS=3).\n\n{listed}\n\n"
        f"pipelite {command} {HELP_ALL} lists all options, --print_config what they come to."
    )
