"""What `retention serve` does with its options."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import sys
from collections.abc import Callable

import torch

from retention.lm import devices
from retention.lm.errors import UsageError
from retention.serve import models, server
from retention.serve.app import Limits, create_app
from retention.serve.engine import Engine
from retention.serve.metrics import Metrics
from retention.serve.models import Model, Network
from retention.serve.steps import Steps

API_KEY = "RETENTION_API_KEY"  # of the environment
# Where memory is not asked for: sequences at once on a CPU.
_SLOTS_ON_A_CPU = 16
# Of a GPU's memory that is free beside the model: the rest is for activations and graphs.
_SHARE_FOR_SLOTS = 0.8
_MOST_SLOTS = 256
_FAILED = 1


def run(options: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Serves until it is told to end.

    Args:
        options: of the command line.
        write: to standard output.

    Returns:
        0 where it was told to end, 1 where the engine failed.

    Raises:
        UsageError: for what cannot be served as asked.
    """

    def say(line: str) -> None:
        print(f"retention serve: {line}", file=sys.stderr, flush=True)

    limits = Limits(
        _api_key(options.api_key),
        options.max_prompt_tokens,
        options.max_new_tokens,
        options.max_body_bytes,
    )
    # First of all, so that it need not be waited for where it fails.
    with server.bind(options.host, options.port) as bound:
        model = _load(options, say)
        slots = model.network.memories[0].slots
        # States of 16 bits are rounded at random, by their slot: nothing is the same in all.
        invariant = options.batch_invariance and options.state_dtype == "float32"
        steps = Steps(model.network, invariant)
        metrics = Metrics()
        engine = Engine(model, steps, options.max_queue, options.prefill_tokens, metrics)
        metrics.watch(engine)
        app = create_app(engine, metrics, limits)
        running = server.Server(app, engine, options.shutdown_seconds, say)
        _warn(options.host, limits, say)
        write(
            f"{model.name} on {server.url_of(bound)}: {slots} slots of "
            f"{model.network.slot_bytes():,} bytes on {model.network.device}, batches of "
            f"{', '.join(map(str, steps.sizes))}"
            f"{'' if invariant else ', which may round differently'}\n"
        )
        asyncio.run(running.serve([bound]))
    if engine.failure is not None:
        say(f"error: {engine.failure}")
        return _FAILED
    return 0


def _load(options: argparse.Namespace, say: Callable[[str], object]) -> Model:
    """The model, with the memory of its slots."""
    device = devices.open_device(options.device or devices.default_device())
    model = models.load(
        *(options.model, device, options.dtype, getattr(torch, options.state_dtype)),
        *(options.served_model_name, say),
    )
    model.network.allocate(_slots(model.network) if options.slots is None else options.slots)
    return model


def _api_key(option: str | None) -> str | None:
    for name, key in (("--api-key", option), (API_KEY, os.environ.get(API_KEY))):
        if key is not None:
            if not key or key != key.strip() or not key.isascii():
                raise UsageError(f"{name}: expected a key of ASCII, without spaces around it")
            return key
    return None


def _slots(network: Network) -> int:
    """As many as there is memory for."""
    if network.device.type != "cuda":
        return _SLOTS_ON_A_CPU
    free, _ = torch.cuda.mem_get_info(network.device)
    each = network.slot_bytes()
    slots = int(free * _SHARE_FOR_SLOTS) // each
    if slots < 1:
        raise UsageError(
            f"--slots: {free:,} bytes are free on {network.device}, of which "
            f"{_SHARE_FOR_SLOTS:.0%} are for slots, and one takes {each:,}; name a number"
        )
    return min(slots, _MOST_SLOTS)


def _warn(host: str, limits: Limits, say: Callable[[str], object]) -> None:
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and limits.api_key is None:
        say(f"whoever reaches {host} may use it: there is no --api-key, nor {API_KEY}")
