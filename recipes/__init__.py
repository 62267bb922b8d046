"""Recipes that make the models of this repository."""
