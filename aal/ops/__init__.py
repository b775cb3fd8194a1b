"""Pure tensor functions, one operation per file."""
