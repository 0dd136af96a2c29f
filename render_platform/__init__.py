"""Meters GPU inference, keeps every bill, and proves it years later."""

__version__ = "0.1.0"
