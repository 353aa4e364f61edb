"""The sections of a configuration."""

SECTIONS = ("trainer", "model", "data")
