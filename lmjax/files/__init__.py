"""Durable files: manifests, locks, background writing and safe file names."""
