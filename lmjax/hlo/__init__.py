"""Compiled programs, read: what they send and what they compute, by the parts of a model."""
