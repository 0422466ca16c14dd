"""One file a format: recorded runs in, episodes or refusals out."""
