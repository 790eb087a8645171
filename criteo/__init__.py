"""Criteo's data format: columns, text, raw files, packed rows, prepared data, demo data."""
