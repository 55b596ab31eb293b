"""From an image to a map."""
