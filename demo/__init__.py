"""The demo: `python -m demo`, run by `make demo`."""
