"""Side-by-side benchmarks against what people use today. Not installed with the package; run them with `make bench`."""
