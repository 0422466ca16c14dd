"""The loop that runs by itself, on real weights: `python -m demo.loop`, run by `make loop`."""
