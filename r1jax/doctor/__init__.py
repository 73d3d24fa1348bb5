"""Looks at a machine before a run does: each check gives findings, and what is bad says what to change."""
