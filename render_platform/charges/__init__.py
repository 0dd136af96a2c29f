"""Charges: what usage costs. Price book, rating, daily charges and monthly invoices in the log, exports, spend."""
