"""Samplers on a density given as a function of rows; they know no model."""
