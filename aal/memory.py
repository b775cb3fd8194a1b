"""How many bytes autograd holds between forward and backward, and where.

*Saved bytes* are what the graph of the outputs keeps alive: tensors in ``save_for_backward``,
tensors on ``ctx`` or in a closure, and NumPy arrays. Each storage counts once; parameters and the
storages of the arguments do not count. The number is the same on CPU and GPU up to the
workspaces of kernels.
"""
