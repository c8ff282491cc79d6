"""A sentence classifier with 4-bit weights and 8-bit inputs: MiniLM on SST-2 through Trainer, then through `pipeline`.

python recipes/jobs/sentences.py train.tsv    # lines of a sentence, a tab and 0 or 1
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

import hf_daq


def main(file, name="sentence-transformers/all-MiniLM-L6-v2", **arguments):
    rows = load_dataset(
        "csv", data_files=file, delimiter="\t", column_names=["text", "label"], quoting=3, split="train"
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns="text")
    labels = {0: "negative", 1: "positive"}
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, id2label=labels)
    arguments = {"per_device_train_batch_size": 32, "num_train_epochs": 2, "save_strategy": "no"} | arguments

    args = TrainingArguments("out/float", learning_rate=5e-5, **arguments)
    Trainer(model, args, train_dataset=rows, processing_class=tokenizer).train()  # the float network first

    hf_daq.apply_daq(model, weight_bits=4, activation_bits=8, weight_granularity="channel")
    batch = tokenizer.pad(rows.remove_columns("label")[:64], return_tensors="pt").to(model.device)
    with hf_daq.calibrate(model):
        model(**batch)
    print(hf_daq.health(model, batch))
    args = TrainingArguments("out/sentences", learning_rate=1e-4, **arguments)
    optimizer = hf_daq.trainer_optimizer(args)
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer, optimizer_cls_and_kwargs=optimizer)
    trainer.train()
    hf_daq.save_pretrained(model.eval(), "out/sentences", packed=True)
    tokenizer.save_pretrained("out/sentences")
    classify = pipeline("text-classification", "out/sentences")
    print(classify("A film that makes you smile."))


if __name__ == "__main__":
    main(*sys.argv[1:])
