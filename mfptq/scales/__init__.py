"""Input scales, wherever they come from."""
