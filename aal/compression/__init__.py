"""Compressors of the tensors that autograd saves; the front door is ``aal.compress``."""
