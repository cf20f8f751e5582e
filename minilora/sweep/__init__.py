"""Runs in, rows out: settings, the grid, workers and results."""
