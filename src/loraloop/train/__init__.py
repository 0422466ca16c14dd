"""The training process: `python -m loraloop.train`."""
