"""Reads compiled programs: what they send and what they compute, by part of the model."""
