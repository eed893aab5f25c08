"""What the public functions are made of. Modules import downwards only, in this order:

- ``operators``: ``torch.ops.retention``, with fakes and autograd; ``decoding_operators``: those
  that change a pool; ``flops`` and ``sharding`` tell PyTorch's counter of operations and DTensor
  about the former
- ``cuda``: the compiled kernels; ``pytorch``: the path in PyTorch operations
- ``decoding`` and ``reference``, which are no operators; ``pool``, the memory of many sequences
- ``arguments``, ``call``, ``checks``: what a call is, and which are accepted
- ``symmetric_power``, ``numerics``: the mathematics
- ``torch_private``, ``on_import``: what is not PyTorch's public interface
"""
