"""Scores of a model, and the report that compares several."""
