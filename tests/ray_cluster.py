"""A Ray cluster of two nodes on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a cluster of two nodes of one CPU each in a block; skip the test where Ray is not installed."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield
    finally:
        cluster.shutdown()
