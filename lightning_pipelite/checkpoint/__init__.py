"""Training checkpoints: directories of safetensors and JSON files, described in docs/checkpoints.md.

- :mod:`.layout`, :mod:`.manifest`, :mod:`.encoding`, :mod:`.tensor_file`: the format,
- :mod:`.reader`: reads it, without Lightning or DeepSpeed; :func:`read_checkpoint` is for other programs,
- :mod:`.directory`: atomic replacement of whole directories,
- :mod:`.find`: resolves ``last``,
- :mod:`.writer`: writes in the background, on all ranks together,
- :mod:`.stage_state`: a stage's parameters and optimizer state by name,
- :mod:`.store`: the interface for the strategy.
"""

from typing import TYPE_CHECKING

from lightning_pipelite.shared.lazy_names import lazy_names

if TYPE_CHECKING:
    from lightning_pipelite.checkpoint.reader import read_checkpoint

__all__ = ["read_checkpoint"]
__getattr__ = lazy_names(__name__, {"read_checkpoint": "reader"})
