"""Audits of anything on disk."""
