"""The same training step, written by other means; nothing here uses lmjax."""
