"""Recipes: what a run is told, in one TOML file."""
