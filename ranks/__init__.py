"""Processes: who this one is, their model's shape, which tables and rows are whose, collectives."""
