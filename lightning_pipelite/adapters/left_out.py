"""What a multimodal checkpoint holds besides the text model that is trained: its towers, saved unchanged."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lightning_pipelite.models.meta_model import MetaModel
from lightning_pipelite.models.stored.weights import StoredWeights
from lightning_pipelite.models.transformers_compat import (
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)


def left_out_weights(meta_model: MetaModel) -> Iterator[dict[str, Tensor]]:
    """Yield, for each weight file, the tensors that do not belong to the text model, by their names in the file."""
    transforms = get_model_conversion_mapping(meta_model.model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    own = dict.fromkeys(meta_model.model.state_dict(), True)
    prefix = meta_model.model.base_model_prefix
    weights = StoredWeights(meta_model.model_dir, meta_model.stored)
    for header in weights.headers.values():
        names = [
            name
            for name in header
            if name not in own
            and rename_source_key(name, renamings, converters, prefix, own)[0] not in own
            and not weights.adds_nothing(name)
        ]
        if names:
            yield {name: weights.read(name) for name in names}
