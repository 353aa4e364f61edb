"""A configuration of qlora-pipe-lite, consumed key by key until none is left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning_pipelite.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class FormerConfig:
    """The keys of a TOML file that have not been taken yet.

    Args:
        path: The file.

    Raises:
        ConfigurationError: It cannot be read as TOML.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._left: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(
                f"{path} cannot be read as TOML ({error}); give a configuration of qlora-pipe-lite."
            ) from None

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def pop(self, key: str) -> Any:
        """Take the value of an existing key, whatever its type."""
        return self._left.pop(key)

    def take(self, key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """Take the value of a key.

        Args:
            key: Its name.
            kind: The types that the value may have.
            default: Value if the key is absent; without a default the key is required.

        Raises:
            ConfigurationError: The key is missing, or its value has another type.
        """
        if key not in self._left:
            if not default:
                raise ConfigurationError(f"{self._path} has no {key}; add it.")
            return default[0]
        value = self._left.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(each.__name__ for each in kinds)
            raise ConfigurationError(f"{self._path}: {key} is {value!r}; set it to a value of type {names}.")
        return value

    def require_empty(self) -> None:
        """Refuse keys that qlora-pipe-lite never had.

        Raises:
            ConfigurationError: A key has not been taken.
        """
        if self._left:
            raise ConfigurationError(
                f"{self._path} has the key{'s' if len(self._left) > 1 else ''} {', '.join(sorted(self._left))}, which "
                f"qlora-pipe-lite does not have; correct or remove {'them' if len(self._left) > 1 else 'it'}."
            )
