"""The built-in example: a task, a tokenizer and a small model made on the spot, trained by the real commands."""
