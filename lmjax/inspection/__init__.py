"""Reads programs, traced and compiled, and compares them with their policies."""
