"""Evaluation of models and reports."""
