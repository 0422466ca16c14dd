"""Messages to token ids and loss weights, through the model's own chat template."""
