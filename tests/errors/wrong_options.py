"""Wrong options on the command line, in files and in the environment."""

from __future__ import annotations

from wrong_input import Case, callback, file, strategy

GIVEN = "must be given, in the configuration file or on the command line."

CASES = {
    # The command and its files
    "unknown subcommand": Case(
        "train is not a command; use pipelite fit or pipelite validate; pipelite --help lists all commands.",
        command=["train"],
    ),
    "test": Case(
        "test is not a command; pipelite validate evaluates on the data of eval_fraction and eval_datasets; to use a "
        "trained model in other programs, run pipelite merge or pipelite export-gguf.",
        command=["test"],
    ),
    "optimizer of another command line": Case(
        "--optimizer is not an option; set --model.optimizer instead.", ["--optimizer", "Adam"]
    ),
    "schedule of another command line": Case(
        "--lr_scheduler is not an option; set --model.schedule instead.",
        ["--lr_scheduler", "StepLR"],
    ),
    "subcommand after its options": Case(
        "no command is given; use pipelite fit or pipelite validate.", command=["--config", "config.yaml"]
    ),
    "argument that is no option": Case("now is not an option; pipelite fit --help lists the options.", ["now"]),
    "option without a value": Case("--trainer.max_steps has no value; write one after it.", ["--trainer.max_steps"]),
    "no configuration file there": Case(
        "--config: File does not exist: '{here}/none.yaml'; give a YAML or JSON file.",
        command=["fit", "--config", "none.yaml"],
    ),
    "directory as a configuration file": Case(
        "--config: Path is not a file: '{here}/.'; give a YAML or JSON file.", command=["fit", "--config", "."]
    ),
    "invalid YAML": Case(
        "the configuration file bad.yaml cannot be read (line 2: expected the node content, but found '<stream end>'); "
        "correct it.",
        prepare=file("bad.yaml", "model: [\n"),
        command=["fit", "--config", "bad.yaml"],
    ),
    "text for a configuration": Case(
        "the configuration file bad.yaml contains no options; write them in sections such as model and data.",
        prepare=file("bad.yaml", "train it please"),
        command=["fit", "--config", "bad.yaml"],
    ),
    # Keys and types
    "unknown option": Case("--model.lrr is not an option; did you mean --model.lr?", ["--model.lrr", "1"]),
    "unknown key of the model": Case("model.lrr is not an option; did you mean model.lr?", edit={"model.lrr": 1}),
    "unknown key of the trainer": Case(
        "trainer.max_step is not an option; did you mean trainer.max_steps?", edit={"trainer.max_step": 1}
    ),
    "unknown key of the data": Case(
        "data.sequence_length is not an option; did you mean data.sequence_len?", edit={"data.sequence_length": 64}
    ),
    "unknown key of a dataset": Case(
        "data.datasets.path is not an option; correct its name or remove it.", edit={"data.datasets": [{"path": "."}]}
    ),
    "unknown key of the adapter": Case(
        "model.adapter.alpha is not an option; a LoRA's scale is 1 here, as with an alpha equal to the rank: leave it "
        "out, and set model.adapter.init_args.rank and model.lr.",
        edit={"model.adapter.init_args.alpha": 4},
    ),
    "unknown key of the strategy": Case(
        "trainer.strategy.stages is not an option; correct its name or remove it.", edit=strategy(stages=2)
    ),
    "unknown key of a callback": Case(
        "trainer.callbacks.evals is not an option; correct its name or remove it.",
        edit=callback("EvalSchedule", evals=2),
    ),
    "unknown section": Case(
        "optimizer.lr is not an option; set model.optimizer instead.", edit={"optimizer": {"lr": 1}}
    ),
    "number for a section": Case("trainer is 3; it must hold the options of trainer.", edit={"trainer": 3}),
    "text for a section": Case(
        "data is 'texts'; it must hold the options of data, or name a file with them.",
        edit={"data": "texts"},
    ),
    "missing model_dir": Case(f"model.model_dir {GIVEN}", edit={"model.model_dir": None}),
    "missing adapter": Case(f"model.adapter {GIVEN}", edit={"model.adapter": None}),
    "missing rank": Case(f"model.adapter.rank {GIVEN}", edit={"model.adapter.init_args.rank": None}),
    "missing dataset_path": Case(f"data.datasets.dataset_path {GIVEN}", edit={"data.datasets": [{"max_tokens": 9}]}),
    "nothing at all": Case(
        f"model.model_dir, model.adapter, data.datasets, data.sequence_len {GIVEN}", command=["fit"]
    ),
    "text for a number": Case("model.lr must be a number, not fast.", edit={"model.lr": "fast"}),
    "no number": Case("model.lr must be a number, not nan.", ["--model.lr", "nan"]),
    "text for an integer or null": Case(
        "trainer.max_epochs must be an integer or null, not many.", edit={"trainer.max_epochs": "many"}
    ),
    "another choice": Case(
        "model.dtype must be one of 'bfloat16', 'float32', not float64; did you mean float32?",
        edit={"model.dtype": "float64"},
    ),
    "wrong type in the adapter": Case(
        "model.adapter.rank must be an integer, not high.", edit={"model.adapter.init_args.rank": "high"}
    ),
    "wrong type in the strategy": Case(
        "trainer.strategy.pipeline_stages must be an integer, not two.", edit=strategy(pipeline_stages="two")
    ),
    "wrong type in a callback": Case(
        "trainer.callbacks.evals_per_epoch must be an integer, not often.",
        edit=callback("EvalSchedule", evals_per_epoch="often"),
    ),
    "unknown adapter": Case(
        "model.adapter: there is no class Lora; give its class_path, as in package.module.Lora.",
        edit={"model.adapter": "Lora"},
    ),
    "class_path that cannot be imported": Case(
        "model.adapter: class_path lightning_pipelite.adapters.Lora cannot be imported (module "
        "'lightning_pipelite.adapters' has no attribute 'Lora'); correct it, or install its dependencies.",
        edit={"model.adapter.class_path": "lightning_pipelite.adapters.Lora"},
    ),
    "class that is no adapter": Case(
        "model.adapter: class_path torch.nn.Linear is not a subclass of Adapter; give one that is.",
        edit={"model.adapter.class_path": "torch.nn.Linear"},
    ),
    "tokenizer of its own": Case(
        "data.tokenizer_dir is always model.model_dir; leave it out.", ["--data.tokenizer_dir", "model"]
    ),
    # The environment
    "variable that is no option": Case(
        "the environment variable PIPELITE_FIT__TRAINER__MAX_STEP is not an option; did you mean "
        "PIPELITE_FIT__TRAINER__MAX_STEPS?",
        environment={"PIPELITE_FIT__TRAINER__MAX_STEP": "3"},
    ),
    "variable for a part of an option": Case(
        "the environment variable PIPELITE_FIT__MODEL__ADAPTER__RANK is not an option; set "
        "PIPELITE_FIT__MODEL__ADAPTER as a whole, in JSON.",
        environment={"PIPELITE_FIT__MODEL__ADAPTER__RANK": "3"},
    ),
    "variable of a wrong type": Case(
        "trainer.max_steps must be an integer, not many.", environment={"PIPELITE_FIT__TRAINER__MAX_STEPS": "many"}
    ),
    "variable with a damaged file": Case(
        "the configuration file bad.yaml contains no options; write them in sections such as model and data.",
        prepare=file("bad.yaml", ""),
        environment={"PIPELITE_FIT__CONFIG": "bad.yaml"},
    ),
}
