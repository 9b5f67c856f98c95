"""Benchmarks: ours and its peers in one process, in turn. docs/performance.md says how and shows the results."""
