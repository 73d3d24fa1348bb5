"""Rows of a dataset become the packed batches of optimizer steps: sources, templates, tokens, plan, batches."""
