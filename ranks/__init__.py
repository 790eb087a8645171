"""Processes: who this one is, which tables and rows are whose, collectives."""
