"""What a command shows and obeys: stages, progress, streams, signals."""
