"""Everything beyond one machine at once, killed part by part. `make test-scale` runs it; else it is skipped."""
