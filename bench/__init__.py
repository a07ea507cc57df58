"""Benches: how fast, how small, how cheap; each beside what users have today."""
