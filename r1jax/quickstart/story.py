"""What the quickstart tells on the way."""
