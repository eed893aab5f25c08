"""The public functions: one for training and prefill, one for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from retention.ops import checks, operators  # noqa: F401  (registers torch.ops.retention)
from retention.ops.arguments import cast_for_autocast, check_arguments, check_decoding_arguments
from retention.ops.call import Operands, short_arguments
from retention.ops.cuda import inference
from retention.ops.decoding import decode


def power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    *,
    sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Causal power retention, at a cost linear in the sequence's length.

    With ``L = cumsum(log_G)`` and degree ``p``::

        w_ij = (scale * q_i . k_j)^p * exp(L_i - L_j)   for j <= i
        o_i  = sum_j w_ij v_j / sum_j w_ij              0 / 0 = 0, with zero gradient

    This is the power attention of Gelada, Buckman, Zhang and Bach, "Scaling Context Requires
    Rethinking Attention" (arXiv:2507.04239), gated, and normalised by the sum of the weights. Past
    tokens are read through a state of fixed size::

        S_T = exp(L_T) S_0 + sum_j exp(L_T - L_j) phi_k(k_j) v_j^T
        z_T = exp(L_T) z_0 + sum_j exp(L_T - L_j) phi_k(k_j)

    whose rows are in the order of :func:`retention.expand`. The arithmetic is float32 (float64 for
    float64 inputs) whatever the inputs' dtype. Compiled kernels for CUDA devices, where
    :func:`retention.info` names them, take the products of bfloat16 and float16 inputs on tensor
    cores, with sums and states in float32; heads narrower than theirs are padded with zeros. All
    other calls run as PyTorch operations. The logger ``retention`` says at level DEBUG which, and
    why.

    DTensors may be sharded by batch or by heads, where every rank gets as many key heads; sharded
    otherwise, they are redistributed first. ``keep_states`` does nothing for them.

    Args:
        Q: queries ``[b, t, hq, d]``, d a multiple of 8; float64, float32, bfloat16 or float16. Any
            t from 0 up, any strides. Under autocast, Q, K and V are cast to the autocast dtype.
        K: keys ``[b, t, h, d]`` in Q's dtype, where hq is a multiple of h; query head n reads key
            head ``n // (hq // h)``.
        V: values ``[b, t, h, dv]`` in Q's dtype.
        log_G: log gates ``[b, t, h]``, at most 0 in practice; float32, or float64 with float64
            inputs. A token's gate decays all that came before it, not its own key. One of -inf, or
            far below 0, resets: nothing from before reaches the token or later ones, nor a gradient
            back. Default: no decay.
        initial_state: ``[n, h, D, dv]`` with ``D = state_dim(d, deg)``, n the batch or, packed, the
            number of sequences; float32, or float64 with float64 inputs. Default: nothing came
            before.
        return_final_state: also return the state after the last token. Default False.
        deg: the degree p, positive and even. Default 2.
        scale: multiplies the scores; finite and not 0. Default ``1 / sqrt(d)``. It cancels in the
            output, and is no part of the state.
        chunk_size: tokens in a chunk, at least 1; t need not be a multiple. Kernels round it up to
            a multiple of 64. Default: chosen by shape.
        switch_over_seq_len: at or below this length the quadratic form is used. Default: the chunk
            size, or where that is left to us, the length from which chunks are faster. Packed
            sequences are compared one by one.
        sum_of_keys: ``[n, h, D]``, in the dtype of ``initial_state``: required with it.
        cu_seqlens: int32 ``[n + 1]``: b is 1 and sequence i is tokens ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]``, each with a state of its own. A sequence of length 0 hands its
            initial state through, and costs next to nothing where there are no states. Tokens
            before the first sequence and behind the last are nobody's: their outputs and gradients
            are 0, and nothing of what they hold is read. Values on a CUDA device are not checked by
            the kernels, which would have to wait for them: they are clamped to [0, t].
        keep_states: keep the states before each chunk for backward, where kernels take the call:
            n h D dv elements of Q's dtype for every chunk of c tokens. Default False: backward
            computes them again, and what is kept are the inputs and twice the output.

    Returns:
        ``O`` ``[b, t, hq, dv]`` in Q's dtype; with ``return_final_state``,
        ``(O, state [n, h, D, dv], sum_of_keys [n, h, D])``, states in float32 (float64). All are
        differentiable once in Q, K, V, log_G, initial_state and sum_of_keys. What only serves
        gradients of inputs that require none is not computed.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value. The
            message names it, what it got and what it accepts.
    """
    Q, K, V, log_G = cast_for_autocast(Q, K, V, log_G)
    operands = Operands(Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens)
    check_arguments(operands, deg, scale)
    checks.check_chunks(chunk_size, switch_over_seq_len)
    save_for_backward = False  # autograd decides
    options = (
        *(deg, chunk_size, switch_over_seq_len),
        *(return_final_state, save_for_backward, keep_states),
    )
    arguments = short_arguments(operands, options)
    out, _, state, keys, _, _ = torch.ops.retention.forward(*arguments)
    return (out, state, keys) if return_final_state else out


def power_retention_inference(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    switch_over_seq_len: int | None = 512,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step of decoding, with the definition of :func:`retention.power_retention`.

    K and V are a cache of the tokens since the state was last updated, the new ones last. The
    queries belong to its last tq tokens. Once the cache is long enough it is folded into the
    returned state, and the caller goes on with an empty cache::

        out, state, sum_of_keys = power_retention_inference(
            q, keys, values, log_gates, state, sum_of_keys, switch_over_seq_len=512
        )
        if keys.shape[1] >= 512:
            keys, values, log_gates = keys[:, :0], values[:, :0], log_gates[:, :0]

    The kernels of :class:`retention.RetentionCache` run calls of up to 16 tokens that they cover,
    where no gradients are wanted and nothing is traced: queries then read the state rounded to
    bfloat16, and a fold is exact to float32. That class does without the copies of state and cache
    that they take here. All other calls run as PyTorch operations.

    Args:
        Q: queries ``[b, tq, hq, d]``, tq at least 1; float64, float32, bfloat16 or float16.
        K: cached keys ``[b, tk, h, d]``, tk at least tq, hq a multiple of h. None, with V, where a
            state is given: the queries then read the state as it is.
        V: cached values ``[b, tk, h, dv]``, or None with K.
        log_G: log gates of the cached tokens ``[b, tk, h]``, float32 (or float64 with float64
            inputs), down to -inf: query ``n`` sees the decay up to its own token. Default: no
            decay. None where K is.
        initial_state: the state before the cache's first token, ``[b, h, D, dv]`` with
            ``D = state_dim(d, deg)``, float32 (float64 for float64 inputs). Default: none.
        sum_of_keys: ``[b, h, D]``: required with ``initial_state``.
        deg: the degree p, positive and even. Default 2.
        scale: multiplies the scores; it cancels in the output. Default ``1 / sqrt(d)``.
        switch_over_seq_len: a cache of at least this many tokens is folded. None: never. Default
            512.

    Returns:
        ``(out [b, tq, hq, dv] in Q's dtype, state, sum_of_keys)``. The state is a new one if the
        cache was folded; else the very ``initial_state`` and ``sum_of_keys`` that came in, or None.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value. The
            message names it, what it got and what it accepts.
    """
    Q, K, V, log_G = cast_for_autocast(Q, K, V, log_G)
    check_decoding_arguments(
        Q, K, V, log_G, initial_state, sum_of_keys, deg, scale, switch_over_seq_len
    )
    operands = Operands(Q, K, V, log_G, initial_state, sum_of_keys)
    if inference.takes(operands, deg):
        return inference.decode(operands, deg, switch_over_seq_len)
    return decode(*operands[:6], deg, switch_over_seq_len)
