"""Episode stores: in memory and on SQLite, the same by one conformance test."""
