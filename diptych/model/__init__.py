"""What a step computes. Torch lives here: configuration and weights, layers, attention, sampling, the runner."""
