"""The text and the caches that tests of whole runs share."""

from run_helpers import home

__all__ = ["home"]
