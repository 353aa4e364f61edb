"""Utilities that every subpackage may use, one idea per file."""
