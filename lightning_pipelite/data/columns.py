"""Conversion of column values to the plain values of JSON records."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.types as kinds


def plain(scalar: pa.Scalar) -> Any:
    """Return a column's value as JSON would represent it.

    A struct column gives every object the union of all keys, so keys whose value is null are removed. An explicit null
    in a record's object is lost as well, because the two cannot be told apart. Maps keep each record's own keys.
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
