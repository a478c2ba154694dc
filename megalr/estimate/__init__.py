"""Predictions before a run: memory of a rank, time of an update, cost of communication."""
