"""Learn models: what of an episode becomes a sample."""
