"""Pickles of torch, read without running anything that is in them."""
