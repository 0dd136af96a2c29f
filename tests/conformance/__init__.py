"""One behaviour suite for each storage interface, run on every implementation of it."""
