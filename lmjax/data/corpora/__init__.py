"""Texts that ship inside the package, and the scripts that made them. Standard library only."""
