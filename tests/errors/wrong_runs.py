"""Wrong inputs concerning devices, the trainer, checkpoints and where results go."""

from __future__ import annotations

from wrong_input import Case, adapter, callback, copied, file, removed, strategy, truncated, written

CASES = {
    # The trainer and the strategy
    "stages that do not divide the devices": Case(
        "pipeline_stages=2 must divide the number of devices (3); change pipeline_stages, or devices and num_nodes.",
        edit={"trainer.devices": 3, **strategy(pipeline_stages=2)},
    ),
    "more stages than layers": Case(
        "pipeline_stages=5 is more than the 4 layers of the model; use at most 4.",
        edit={"trainer.devices": 5, **strategy(pipeline_stages=5)},
    ),
    "unknown partition_method": Case(
        "partition_method must be uniform, parameters, type:REGEX, layers:N,N,... or auto, not 'best'.",
        edit=strategy(partition_method="best"),
    ),
    "timeout below 0": Case(
        "strategy: timeout must be a positive number of seconds, not -1.0.", edit=strategy(timeout=-1)
    ),
    "precision": Case(
        "Trainer(precision='bf16-mixed') is not supported by PipeLiteStrategy: every layer keeps the dtype that the "
        "module gives it (for PipeLiteModule, set dtype); leave precision out.",
        edit={"trainer.precision": "bf16-mixed"},
    ),
    "another strategy": Case(
        "PipeLiteModule requires PipeLiteStrategy, not ddp: set trainer.strategy to pipelite.",
        edit={"trainer.strategy": "ddp", "trainer.devices": 2},
    ),
    "no strategy at all": Case(
        "PipeLiteModule requires PipeLiteStrategy, not auto: set trainer.strategy to pipelite.",
        edit={"trainer.strategy": "auto"},
    ),
    "unknown strategy": Case(
        "PipeLiteModule requires PipeLiteStrategy, not pipelight: set trainer.strategy to pipelite.",
        edit={"trainer.strategy": "pipelight"},
    ),
    "no device": Case(
        "trainer.devices is 0; give the number of devices, a list of device indices, or auto.",
        edit={"trainer.devices": 0},
    ),
    "steps below 0": Case(
        "trainer.max_steps is -5; give a number of steps, or -1 for no limit.",
        edit={"trainer.max_steps": -5},
    ),
    "no micro-batch a step": Case(
        "trainer.accumulate_grad_batches is 0; give a number above 0, or leave it out.",
        edit={"trainer.accumulate_grad_batches": 0},
    ),
    "clipping below 0": Case(
        "trainer.gradient_clip_val is -1.0; give a number above 0, or leave it out.",
        edit={"trainer.gradient_clip_val": -1.0},
    ),
    "seed below 0": Case("seed_everything is -1; give an integer from 0 to 4294967295.", edit={"seed_everything": -1}),
    "averaged weights": Case(
        "the callback EMAWeightAveraging is not supported by PipeLiteStrategy: it averages the weights that the module "
        "has before the pipeline builds its stages; leave it out, and average checkpoints or adapters afterwards.",
        edit={"trainer.callbacks": [{"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}]},
        starts=True,  # importing torch's module for it starts a Python process to query its paths
    ),
    "metric that nothing logs": Case(
        "EarlyStopping: monitor is 'val_loss', which nothing logs; set it to eval/loss, or to another metric "
        "that is logged.",
        edit={"trainer.callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]},
    ),
    "micro-batches by two": Case(
        "trainer.accumulate_grad_batches is 2, but a GradientAccumulationScheduler sets it for each epoch; leave one "
        "of the two out.",
        edit={
            "trainer.accumulate_grad_batches": 2,
            "trainer.callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
                    "init_args": {"scheduling": {0: 1, 1: 2}},
                }
            ],
        },
    ),
    "overfitted batches": Case(
        "trainer.overfit_batches needs data whose order Lightning can change, but that of packed data is fixed; set "
        "data.max_sequences to train on a few sequences.",
        edit={"trainer.overfit_batches": 2},
    ),
    "no evaluation in an epoch": Case(
        "EvalSchedule: evals_per_epoch must be at least 1, not 0.", edit=callback("EvalSchedule", evals_per_epoch=0)
    ),
    # What is on disk
    "checkpoint that is not there": Case(
        "ckpt_path: none is not a checkpoint (a directory with manifest.json); name one, or leave ckpt_path out.",
        ["--ckpt_path", "none"],
    ),
    "file as a checkpoint": Case(
        "ckpt_path: config.yaml is not a checkpoint (a directory with manifest.json); name one, or leave ckpt_path out.",
        ["--ckpt_path", "config.yaml"],
    ),
    "best checkpoint of nothing": Case(
        "ckpt_path: `best` is known only to the process that trained the model; name the checkpoint's directory, or use `last` for the newest one. (TimedCheckpoint with a monitor keeps the best one in addition to the newest.)",
        ["--ckpt_path", "best"],
    ),
    "last checkpoint of none": Case(
        "ckpt_path: there is no checkpoint in {here}/kept for `last`; leave ckpt_path out to start from scratch.",
        ["--ckpt_path", "last"],
        edit={**callback("TimedCheckpoint", dirpath="kept"), "trainer.enable_checkpointing": True},
    ),
    "last checkpoint of nobody": Case(
        "ckpt_path: no callback says where to look for `last`: add the TimedCheckpoint, or the ModelCheckpoint with its dirpath, of the training to resume, or name the checkpoint's directory.",
        ["--ckpt_path", "last"],
    ),
    "steps before the checkpoint's": Case(
        "ckpt_path: {job}/adapter-checkpoint was saved at step 1, but max_steps is 0: set max_steps above 1 to continue, or name an earlier checkpoint.",
        ["--ckpt_path", "{job}/adapter-checkpoint"],
        edit={"trainer.max_steps": 0},
    ),
    "checkpoints in a bucket": Case(
        "TimedCheckpoint: dirpath is s3://bucket/kept, but only directories of the file system can be read and written: use a local one, mount the remote one (with s3fs or gcsfuse, for example), or copy the results there afterwards.",
        edit=callback("TimedCheckpoint", dirpath="s3://bucket/kept"),
    ),
    "checkpoint to validate that is not there": Case(
        "ckpt_path: none is not a checkpoint (a directory with manifest.json); name one, or leave ckpt_path out.",
        ["--ckpt_path", "none"],
        command=["validate", "--config", "config.yaml"],
    ),
    "output over something else": Case(
        "{here}/output holds thesis.tex, which saving would delete; move it or save to another place.",
        edit=callback("SaveTrained", output_dir="output"),
        prepare=file("output/thesis.tex", "Of the years of my life"),
    ),
    "output over a file": Case(
        "{here}/output exists and is not a plain directory; choose another place to save to.",
        edit=callback("SaveTrained", output_dir="output"),
        prepare=file("output", ""),
    ),
    "output that cannot be written": Case(
        "config.yaml/output cannot be written (File exists); choose another place to save to.",
        edit=callback("SaveTrained", output_dir="config.yaml/output"),
    ),
    "output over the model": Case(
        "{job}/model holds config.json, which saving would delete; move it or save to another place.",
        edit=callback("SaveTrained", output_dir="{job}/model"),
    ),
    "output over an earlier one": Case(
        "SaveTrained: {job}/adapter is not empty; choose a new output_dir, resume from a checkpoint (ckpt_path), or set "
        "overwrite (--overwrite) to replace its contents.",
        edit=callback("SaveTrained", output_dir="{job}/adapter"),
    ),
    "checkpoints among those of an earlier training": Case(
        "TimedCheckpoint: {here}/checkpoints has step=00000009.ckpt from another training; resume it with "
        "ckpt_path=last, choose a new dirpath, or set overwrite (--overwrite) to replace its contents.",
        edit={**callback("TimedCheckpoint"), "trainer.enable_checkpointing": True},
        prepare=file("checkpoints/step=00000009.ckpt/meta.json", ""),
    ),
    "metrics over those of an earlier training": Case(
        "CSVLogger: logs/a/metrics.csv exists and would be deleted; move it, choose another version, or leave the "
        "version out.",
        edit={
            "trainer.logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "logs", "name": "", "version": "a"},
            }
        },
        prepare=file("logs/a/metrics.csv", "step"),
    ),
    "refusal that comes late": Case(  # and leaves no log directory
        "ckpt_path: {job}/adapter-checkpoint is from another model or adapter: adapter.init_args.rank is 2 in the checkpoint, 3 now.",
        ["--ckpt_path", "{job}/adapter-checkpoint"],
        edit={**adapter("LoRA", rank=3), "trainer.logger": True, "trainer.max_steps": 2},
        starts=True,
    ),
    "output nowhere": Case(
        "SaveTrained: output_dir is empty; name the directory to write.", edit=callback("SaveTrained", output_dir="")
    ),
    # Devices
    "no GPU": Case(
        "trainer.accelerator is gpu but torch finds no GPU here; set it to cpu, or fix the driver (nvidia-smi must list the GPU).",
        edit={"trainer.accelerator": "gpu"},
    ),
    "unknown accelerator": Case(
        "trainer.accelerator is 'quantum'; set it to gpu, cpu or auto.",
        edit={"trainer.accelerator": "quantum"},
    ),
    "accelerator that is not installed": Case(
        "trainer: Requirement 'torch_xla>=1.13' not met. HINT: Try running `pip install -U 'torch_xla>=1.13'`",
        edit={"trainer.accelerator": "tpu"},
    ),
    "devices in words": Case(
        "trainer.devices is 'two'; give the number of devices, a list of device indices, or auto.",
        edit={"trainer.devices": "two"},
    ),
    "no node": Case("trainer.num_nodes is 0; give 1 or more.", edit={"trainer.num_nodes": 0}),
    "no stage": Case(
        "pipeline_stages=0 must divide the number of devices (1); change pipeline_stages, or devices and num_nodes.",
        edit=strategy(pipeline_stages=0),
    ),
    "partition by no regular expression": Case(
        "partition_method: '(' is not a regular expression (missing ), unterminated subpattern at position 0).",
        edit=strategy(partition_method="type:("),
    ),
    "unknown backend": Case(
        "strategy: process_group_backend is 'pigeons'; choose one of gloo, nccl, xccl, ucc, mpi, fake.",
        edit=strategy(process_group_backend="pigeons"),
    ),
    "more processes launched than configured": Case(
        "trainer: You set `devices=1` and `num_nodes=1` in Lightning, but the product (1 * 1) does not match the world size (3).",
        environment={
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29999",
            "TORCHELASTIC_RUN_ID": "3",
        },
    ),
    # The trainer
    "epochs below 0": Case(
        "trainer.max_epochs is -3; give a number of epochs, or -1 for no limit.", edit={"trainer.max_epochs": -3}
    ),
    "time in words": Case(
        "trainer.max_time is 'soon'; write it as days:hours:minutes:seconds, such as 00:12:00:00.",
        edit={"trainer.max_time": "soon"},
    ),
    "logging below 0": Case("trainer.log_every_n_steps is -1; give 0 or more.", edit={"trainer.log_every_n_steps": -1}),
    "evaluation below 0": Case(
        "trainer: You have passed invalid value -1 for val_check_interval, it has to be in [0.0, 1.0] or an int.",
        edit={"trainer.val_check_interval": -1},
    ),
    "no batches": Case(
        "trainer.limit_train_batches is 0; give a number above 0, or leave it out.",
        edit={"trainer.limit_train_batches": 0},
    ),
    "unknown profiler": Case(
        "trainer: When passing string value for the `profiler` parameter of `Trainer`, it can only be one of ['simple', 'advanced', 'pytorch', 'xla']",
        edit={"trainer.profiler": "quick"},
    ),
    "unknown logger": Case(
        "trainer.logger: there is no class tensorboard; give its class_path, as in package.module.tensorboard.",
        edit={"trainer.logger": "tensorboard"},
    ),
    "logger that cannot write": Case(
        "trainer.logger: CSVLogger cannot write to config.yaml; set its save_dir to a writable directory.",
        edit={"trainer.logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "config.yaml"}}},
    ),
    "synchronised batch norms": Case(
        "Trainer(sync_batchnorm=True) is not supported by PipeLiteStrategy; leave it out.",
        edit={"trainer.sync_batchnorm": True},
    ),
    "two progress bars": Case(
        "trainer: You added multiple progress bar callbacks to the Trainer, but currently only one progress bar is supported.",
        edit={"trainer.callbacks": [{"class_path": "TQDMProgressBar"}, {"class_path": "RichProgressBar"}]},
    ),
    "unknown style of progress": Case(
        "trainer.callbacks.style must be one of 'auto', 'rich', 'plain', 'lines', not loud.",
        edit=callback("StepProgress", style="loud"),
    ),
    "weight decay below 0": Case(
        "CompositeWeightDecay: weight_decay must be 0 or more, not -1.0.",
        edit=callback("CompositeWeightDecay", weight_decay=-1.0),
    ),
    "weight decay of no adapter": Case(
        "CompositeWeightDecay: the model has neither PEFT LoRA layers nor Control Adapters; add an adapter, or leave the callback out.",
        edit={**callback("CompositeWeightDecay", weight_decay=0.1), **adapter("Full")},
        starts=True,
    ),
    "checkpoints without end": Case(
        "TimedCheckpoint: checkpoint_interval_hours must be positive, not 0.0.",
        edit=callback("TimedCheckpoint", checkpoint_interval_hours=0),
    ),
    # Checkpoints
    "damaged manifest": Case(
        "ckpt_path: manifest.json of copy does not match its hash; name another checkpoint, or use `last` for the newest intact one.",
        ["--ckpt_path", "copy"],
        prepare=copied("adapter-checkpoint", written("manifest.json", "{")),
    ),
    "checkpoint without a file": Case(
        "ckpt_path: copy is missing the file stage-00.safetensors; name another checkpoint, or use `last` for the newest intact one.",
        ["--ckpt_path", "copy"],
        prepare=copied("adapter-checkpoint", removed("stage-00.safetensors")),
    ),
    "checkpoint cut short": Case(
        "ckpt_path: stage-00.safetensors of copy has 109600 bytes, not 109700; name another checkpoint, or use `last` for the newest intact one.",
        ["--ckpt_path", "copy"],
        prepare=copied("adapter-checkpoint", truncated("stage-00.safetensors")),
    ),
    "model for a checkpoint": Case(
        "ckpt_path: {job}/model is not a checkpoint (a directory with manifest.json); name one, or leave ckpt_path out.",
        ["--ckpt_path", "{job}/model"],
    ),
    "checkpoint of another adapter": Case(
        "ckpt_path: {job}/control-checkpoint is from another model or adapter: adapter.class_path is 'lightning_pipelite.adapters.control_adapter.ControlAdapter' in the checkpoint, 'lightning_pipelite.adapters.lora.LoRA' now.",
        ["--ckpt_path", "{job}/control-checkpoint"],
        starts=True,
    ),
    "checkpoint of another rank": Case(
        "ckpt_path: {job}/adapter-checkpoint is from another model or adapter: adapter.init_args.rank is 2 in the checkpoint, 4 now.",
        ["--ckpt_path", "{job}/adapter-checkpoint", "--model.adapter.rank", "4"],
        starts=True,
    ),
    "checkpoint of another dtype": Case(
        "ckpt_path: {job}/adapter-checkpoint is from another model or adapter: dtype is 'float32' in the checkpoint, 'bfloat16' now.",
        ["--ckpt_path", "{job}/adapter-checkpoint", "--model.dtype", "bfloat16"],
        starts=True,
    ),
}
