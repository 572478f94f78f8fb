"""Time, memory and the share of a machine's floor."""
