"""The values of columns as records have them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.types as kinds


def plain(scalar: pa.Scalar) -> Any:
    """Give a value of a column as JSON would hold it.

    Columns give every object the keys of all: those that hold nothing are taken out again. So a null that a record
    had in an object is lost, too, as nothing tells one from the other. In a map, each record has keys of its own.
    """
    return _plain(scalar.as_py(), scalar.type)


def _plain(value: Any, kind: pa.DataType) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(value, kind.storage_type)
    if kinds.is_dictionary(kind):
        return _plain(value, kind.value_type)
    if kinds.is_struct(kind):
        fields = (kind.field(number) for number in range(kind.num_fields))
        return {each.name: _plain(value[each.name], each.type) for each in fields if value[each.name] is not None}
    if kinds.is_map(kind):
        return {key: _plain(item, kind.item_type) for key, item in value}
    if any(is_kind(kind) for is_kind in _LISTS):
        return [_plain(item, kind.value_type) for item in value]
    return value


_LISTS = (
    kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view, kinds.is_large_list_view,
)  # fmt: skip
