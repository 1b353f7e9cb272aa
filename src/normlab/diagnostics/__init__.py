"""Probes of a model that leave no trace in it."""
