"""Weights that the files of a model hold in fewer bits: one file a format, and one reader."""
