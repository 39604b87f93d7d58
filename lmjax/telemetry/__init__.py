"""What rounding does to the tensors of a run, measured and drawn."""
