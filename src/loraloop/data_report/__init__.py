"""The report that shows, before any training, what the data will teach: findings, a page, plots."""
