"""From trained to used: merge, convert, GGUF, Control Adapter to LoRA, analysis, migration.

Each is a command of ``pipelite`` as well. Nothing here needs Lightning or DeepSpeed.
"""

from lightning_pipelite.export.analyze import analyze
from lightning_pipelite.export.control_to_lora import control_to_lora
from lightning_pipelite.export.convert import convert
from lightning_pipelite.export.gguf import export_gguf
from lightning_pipelite.export.merge import merge
from lightning_pipelite.export.migrate import migrate

__all__ = ["analyze", "control_to_lora", "convert", "export_gguf", "merge", "migrate"]
