"""A data set, arguments and a Trainer for small models."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import hf_daq


class Sentences(Dataset):
    """32 rows of 7 tokens; the label is the parity of the first."""

    rows = torch.randint(1, 64, (32, 7), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index, 0] % 2}


def arguments(folder, **kwargs):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(defaults | kwargs))


def trainer_of(model, args, **kwargs):
    return Trainer(
        model=model,
        args=args,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        optimizer_cls_and_kwargs=hf_daq.trainer_optimizer(args, quantizer_lr=1e-2),
        **kwargs,
    )
