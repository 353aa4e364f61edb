"""What follows training: merging, conversion, GGUF, Control Adapter to LoRA, analysis, migration.

Each is also a ``pipelite`` command. Nothing here needs Lightning or DeepSpeed.
"""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.export.analysis import analyze
    from lightning_pipelite.export.control_lora import control_to_lora
    from lightning_pipelite.export.conversion import convert
    from lightning_pipelite.export.gguf import export_gguf
    from lightning_pipelite.export.merging import merge
    from lightning_pipelite.export.migration import migrate

__all__ = ["analyze", "control_to_lora", "convert", "export_gguf", "merge", "migrate"]
__getattr__ = lazy_names(
    __name__,
    {
        "analyze": "analysis",
        "control_to_lora": "control_lora",
        "convert": "conversion",
        "export_gguf": "gguf",
        "merge": "merging",
        "migrate": "migration",
    },
)
