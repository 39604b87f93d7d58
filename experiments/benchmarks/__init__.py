"""What lmjax costs, measured beside its peers: modules that are run, not trained."""
