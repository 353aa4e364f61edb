"""Helpers that the callbacks share."""
