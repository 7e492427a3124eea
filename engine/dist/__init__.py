"""What many ranks decide together."""
