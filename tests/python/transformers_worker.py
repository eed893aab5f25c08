"""Several processes that share a model of transformers: `transformers_worker.py FOLDER`.

WORLD_SIZE and the like are in the environment, as launchers have them, and RANK in that of each. It
writes `FOLDER/trained-<RANK>.pt`, losses and whole parameters after `train`, and
`FOLDER/tensors-<RANK>.pt`, what models give that are sharded by their tensor-parallel plans.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import retention.transformers as rt
from processes import run_copies

# First, since it keeps transformers offline.
from transformers_cases import tokens

PROCESSES = 2
STEPS = 3
BATCH = 4  # of all processes


class Texts(torch.utils.data.Dataset):
    """Different ones for every step and every row."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = tokens(16, seed=i)
        return {"input_ids": ids, "labels": ids}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(folder: Path, processes: int) -> dict:
    """What `Trainer` makes of the checkpoint `folder/blend`, of which each process has a share."""
    shared = DistributedConfig(fsdp_size=processes) if processes > 1 else None
    model = AutoModelForCausalLM.from_pretrained(folder / "blend", distributed_config=shared)
    losses = Losses()
    arguments = TrainingArguments(
        output_dir=str(folder / f"trainer-{processes}"),
        per_device_train_batch_size=BATCH // processes,
        max_steps=STEPS,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    schedule = rt.BlendSchedule(share=0.9)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Texts(), callbacks=[losses, schedule]
    )
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    return {
        "losses": losses.losses,
        "parameters": {name: whole(x.detach()) for name, x in parameters.items()},
        "not shared": [name for name, x in parameters.items() if not isinstance(x, DTensor)],
    }


def tensor_parallel(folder: Path) -> dict:
    """Logits, gradients and greedy tokens of checkpoints in `folder`, sharded while they load."""
    done = {}
    for kind in ("brumby", "powercoder", "mixed"):
        shared = DistributedConfig(tp_size=PROCESSES)
        model = AutoModelForCausalLM.from_pretrained(folder / kind, distributed_config=shared)
        ids = tokens(2, 11)
        logits = model(ids).logits
        logits.square().mean().backward()
        gradients = {name: whole(x.grad) for name, x in model.named_parameters()}
        out = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
        keys = model.model.layers[-1].self_attn.k_proj.weight
        done[kind] = {
            "logits": logits.detach(),
            "gradients": gradients,
            "tokens": out,
            "rows": keys.to_local().shape[0],
        }
    return done


def one(rank: int, folder: Path) -> None:
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.save(train(folder, PROCESSES), folder / f"trained-{rank}.pt")
    torch.save(tensor_parallel(folder), folder / f"tensors-{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Copies of this one, so that all is imported once.
    run_copies(PROCESSES, one, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
