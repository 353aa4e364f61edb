"""Base weights in fewer bits."""
