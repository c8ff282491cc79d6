"""Instruction tuning of a quantized model with TRL: adapters of LoRA inside the quantizer, or all weights; a packed model at
the end, which computes what was trained, bit for bit.

    python recipes/instruction_tuning.py  # a tiny Llama, answers from Python's help(): a minute on a CPU, no network
    python recipes/instruction_tuning.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --tracker trackio

`--dataset`: a Hub id, or a JSON Lines file; its column is `messages`, or `prompt` and `completion`. `--resume` continues a
stopped run from its last checkpoint, bit for bit. `--model` may be a packed folder: then its codes are what adapters learn on.
`--tracker trackio` needs `pip install trackio`.
"""

import argparse
from pathlib import Path

import datasets
import tokenizers
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import hf_daq


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or Hub id; a tiny Llama with random weights if left out")
    add("--dataset", help="Hub id or JSON Lines file; questions on Python's help() if left out")
    add("--bits", type=int, default=4)
    add("--group_size", type=int, default=64)
    add("--train", choices=("adapters", "adapters and bounds", "all"), default="adapters")
    add("--rank", type=int, default=16)
    add("--max_steps", type=int, default=60)
    add("--batch_size", type=int, default=8)
    add("--max_length", type=int, default=128)
    add("--lr", type=float, default=2e-3)
    add("--save_steps", type=int, default=20)
    add("--tracker", choices=("none", "trackio", "tensorboard"), default="none")
    add("--output_dir", type=Path, default=Path("output"))
    add("--resume", action="store_true")
    return parser.parse_args(argv)


def read(args):
    if args.dataset is None:
        from pydoc_data.topics import topics

        rows = [{"prompt": f"What is {name}?\n", "completion": text[:400]} for name, text in sorted(topics.items())]
        return datasets.Dataset.from_list(rows)
    if Path(args.dataset).is_file():
        return datasets.load_dataset("json", data_files=args.dataset, split="train")
    return datasets.load_dataset(args.dataset, split="train")


def build(args, rows):
    """The float or packed model, and its tokenizer."""
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<pad>", "<end>"]
    bpe.train_from_iterator(rows["completion"], 512, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<end>")
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)), tokenizer


def quantize(model, tokenizer, rows, args):
    """Weights only, calibrated on the first texts."""
    hf_daq.apply_daq(model, weight_bits=args.bits, group_size=args.group_size)
    texts = [str(row.get("messages") or row["prompt"] + row["completion"]) for row in rows.select(range(8))]
    with hf_daq.calibrate(model, check=False):
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=args.max_length, return_tensors="pt")
            model(tokens["input_ids"])


def main(argv=None):
    args = parse(argv)
    torch.manual_seed(0)
    rows = read(args)
    model, tokenizer = build(args, rows)
    if not hasattr(model, "daq_config"):  # else it was opened from a packed or trained folder
        quantize(model, tokenizer, rows, args)
    adapters = {"adapters": "daq", "adapters and bounds": "daq_bounds"}.get(args.train)
    options = {"target_modules": "all-linear", "lora_alpha": 2 * args.rank, "task_type": "CAUSAL_LM"}
    lora = adapters and LoraConfig(r=args.rank, init_lora_weights=adapters, **options)
    config = SFTConfig(
        output_dir=str(args.output_dir / "run"),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        max_length=args.max_length,
        learning_rate=args.lr,
        warmup_steps=max(args.max_steps // 10, 1),
        lr_scheduler_type="cosine",
        save_steps=args.save_steps,
        save_total_limit=1,
        logging_steps=10,
        bf16=torch.cuda.is_available(),
        report_to=args.tracker,
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
        optimizer_cls_and_kwargs=hf_daq.trainer_optimizer(config),
    )
    last = get_last_checkpoint(config.output_dir) if args.resume and Path(config.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)

    # What is merged is what was trained, and so is what is packed.
    trained = trainer.accelerator.unwrap_model(trainer.model)
    merged = trained.merge_and_unload() if adapters else trained
    hf_daq.save_pretrained(merged, args.output_dir / "packed", packed=True)
    tokenizer.save_pretrained(args.output_dir / "packed")
    return trainer


if __name__ == "__main__":
    main()
