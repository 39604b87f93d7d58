"""What turns gradients into updates: optimizer, loss scale, and how moments are stored."""
