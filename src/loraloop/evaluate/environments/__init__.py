"""Suites of loraloop's own: TextCraft, SQL on sqlite3, and any Gymnasium environment that speaks text."""
