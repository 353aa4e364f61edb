"""The names of a checkpoint's files, and the version of their format, described in docs/checkpoints.md."""

from __future__ import annotations

FORMAT = "pipelite checkpoint"
VERSION = 1

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
META = "meta.json"
TRAINER = "trainer.json"
TRAINER_TENSORS = "trainer.safetensors"
STAGE_TENSORS = "stage-{:02d}.safetensors"
STAGE_SETTINGS = "stage-{:02d}.json"

PARAMETER, BUFFER, OPTIMIZER, GROUP = "parameter/", "buffer/", "optimizer/", "group/"
"""Prefixes of the tensor names in a stage's file: ``parameter/NAME``, ``optimizer/NAME/KEY``, ..."""
