"""The laboratory: runs with an identity, their records, dry runs, tables, pictures and pages."""
