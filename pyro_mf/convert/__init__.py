"""Draws, densities and data as ArviZ results, for both generations of ArviZ."""
