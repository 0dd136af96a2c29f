"""Crashes and failures at every write: nothing is lost, nothing stands twice."""
