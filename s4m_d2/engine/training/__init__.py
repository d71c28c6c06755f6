"""Training: trainers, their hooks, loaders, optimizer and state."""
