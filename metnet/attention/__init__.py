"""Spatial attention, one family a file."""
