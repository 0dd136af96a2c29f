"""Tests of the serving component."""
