"""The same training step, written independently; nothing here uses lmjax."""
