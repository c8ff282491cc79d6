"""A small Llama with 2-bit weights that writes: trained on a text file, quantized in groups of 64 columns, opened, asked.

python recipes/jobs/generate.py TEXT_FILE
"""

import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_daq


def main(file, steps=300, width=128, prompt="ROMEO:\n"):
    torch.manual_seed(0)
    learned = ByteLevelBPETokenizer()
    learned.train([str(file)], vocab_size=512, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer)
    tokens = torch.tensor(tokenizer.encode(Path(file).read_text(encoding="utf-8")))
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)

    def train(optimizer, steps):
        for _ in range(steps):
            starts = torch.randint(len(tokens) - 64, (16,)).tolist()
            batch = torch.stack([tokens[start : start + 64] for start in starts])
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"loss {loss.item():.2f}")

    train(torch.optim.AdamW(model.parameters(), lr=2e-3), steps)
    hf_daq.apply_daq(model, weight_bits=2, group_size=64)  # inputs stay in float
    with hf_daq.calibrate(model):
        model(tokens[:2048].view(16, 128))
    train(torch.optim.AdamW(hf_daq.param_groups(model, lr=5e-4)), steps // 3)
    hf_daq.save_pretrained(model.eval(), "out/generate", packed=True)
    model = AutoModelForCausalLM.from_pretrained("out/generate")
    written = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=80, do_sample=True)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
