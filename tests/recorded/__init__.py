"""Runs whose every bit is on record, so that a change of structure can prove it changed nothing."""
