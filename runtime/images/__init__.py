"""From what the user names to a mounted lower layer."""
