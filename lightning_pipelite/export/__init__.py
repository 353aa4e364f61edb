"""From trained to used: merge, convert, GGUF, Control Adapter to LoRA, analysis, migration."""

from lightning_pipelite.export.merge import merge

__all__ = ["merge"]
