"""The trainer that runs a training process, what it returns, and where models are kept."""
