"""Reads torch pickles without executing them."""
