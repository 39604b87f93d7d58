"""Terminal output and signals of a command: stages, progress, streams, interrupts."""
