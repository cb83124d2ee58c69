"""Builders: settings stop here and become plain arguments of the library."""
