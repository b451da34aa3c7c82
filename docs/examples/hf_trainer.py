"""The Trainer of transformers with steep's kernels: one line before training, one to undo it.

    python docs/examples/hf_trainer.py                                       # a tiny random model: seconds on a CPU
    python docs/examples/hf_trainer.py --model DIR --text FILE --bf16        # a real one; FILE holds a document a line

Documents are packed without padding, and the collator says where each begins: that is what lets the attention kernel
work on a GPU without building a mask or waiting for the device.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from steep.kernels import patch, unpatch


def random_documents(count: int, vocab: int) -> list[dict]:
    """Arithmetic progressions: the loss falls within a few steps."""
    documents = []
    for _ in range(count):
        start, step, length = (int(torch.randint(high, ())) for high in (vocab, 3, 40))
        documents.append({"input_ids": [(start + (step + 1) * i) % vocab for i in range(length + 2)]})
    return documents


def text_documents(path: str, model: str, seq_len: int) -> list[dict]:
    """Every line of the file; one that is longer than a sequence becomes several documents."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    tokens = [tokenizer(line)["input_ids"] for line in lines]
    return [{"input_ids": ids[start : start + seq_len]} for ids in tokens for start in range(0, len(ids), seq_len)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face folder; default: a tiny random Llama")
    parser.add_argument("--text", metavar="FILE", help="training text for --model, one document a line")
    parser.add_argument("--out", metavar="DIR", help="where the trained model is saved; default: nowhere")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--documents", type=int, default=8, help="documents packed into one batch")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens of the longest document")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    if bool(options.model) != bool(options.text):
        parser.error("--model and --text go together")

    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="bfloat16" if options.bf16 else "auto")
        documents = text_documents(options.text, options.model, options.seq_len)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2,
            )
        )  # fmt: skip
        documents = random_documents(400, 97)

    report = patch(model)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            train_dataset=documents,
            data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
            args=TrainingArguments(
                output_dir=options.out or scratch,
                per_device_train_batch_size=options.documents,
                max_steps=options.steps,
                learning_rate=options.lr or (1e-5 if options.model else 3e-3),
                bf16=options.bf16,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
    print(report)
    unpatch(model)
    if options.out:
        model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
