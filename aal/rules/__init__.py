"""The learning rules: what stands in for a layer's input in its weight gradient."""
