"""How the tables came from one version to the next, by Alembic, on both databases. A released version is never edited."""
