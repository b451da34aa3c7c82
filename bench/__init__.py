"""Benchmarks: each module has `run(...) -> figures`; `steep bench NAME` runs it and `record` writes the JSON record."""
