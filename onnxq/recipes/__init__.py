"""Preset recipes, as data."""
