"""The operators in PyTorch operations: the path that every device and every call has."""
