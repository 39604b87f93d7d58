"""What makes files durable: manifests, locks, background writing, names that are safe."""
