"""Quantised base weights."""
