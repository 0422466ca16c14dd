"""The loop that runs by itself: what it remembers, what a stage is, one cycle, and the process round it."""
