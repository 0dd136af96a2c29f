"""Benchmarks that anyone can run again: each installs what it compares with, and states machine and versions."""
