"""Reads quantised weights from a model's files: one module per format, and one reader."""
