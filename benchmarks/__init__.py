"""Benchmarks: what Anton costs, measured against a fixed floor and against peers.

python -m benchmarks [NAME ...] [--quick] [--database URL]        make bench BENCH=NAME
"""
