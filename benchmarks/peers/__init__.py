"""Peers: other job queues on the same Postgres, each in its fastest documented configuration."""
