"""Chromium against everything that `up` starts. `make test-ui` runs it; without being asked for it is skipped."""
