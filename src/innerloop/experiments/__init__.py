"""Suites, sweeps and comparisons of many runs, and the pages that show them."""
