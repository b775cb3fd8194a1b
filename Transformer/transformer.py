"""A Transformer that translates, under every learning rule."""

UNKNOWN, PAD, START, END = SPECIAL = range(4)  # ids of the special tokens in every vocabulary
