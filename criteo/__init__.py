"""Criteo's format: columns, text, raw files, rows, prepared data, demo data."""
