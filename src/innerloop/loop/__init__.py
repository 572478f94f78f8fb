"""The inner loop: stabilisers, low-rank updates by iteration, fixed points, its trace and its hooks."""
