"""Text files -> a small Llama, trained by Transformers' Trainer on packed documents. Copy it, and change what is yours.

Run: python -m maskflash.examples.train_transformers --steps 100 (then with more steps, to go on where it ended)
It needs transformers and accelerate: `pip install 'maskflash[transformers]' accelerate`.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from maskflash.integrations.transformers import register

FILES = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.stat().st_size)
SAVE = Path("train_transformers")
LONGEST, BATCH, WORKERS = 2000, 8, 2  # bytes of a document; documents of a step, packed into one row; who packs them


def train(steps: int) -> list[float]:
    """Train up to a step, from the last checkpoint on if there is one, and return the losses."""
    register()  # from here on, models take attn_implementation="mf"
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "max_position_embeddings": LONGEST}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False, attn_implementation="mf"))
    arguments = TrainingArguments(
        output_dir=str(SAVE),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        bf16=True,
        activation_checkpointing=True,
        dataloader_num_workers=WORKERS,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_steps=50,
        report_to="none",
        disable_tqdm=True,
    )
    texts = [{"input_ids": list(path.read_bytes()[:LONGEST])} for path in FILES]
    # The collator lays documents end to end, and starts their positions again: that is all maskflash needs.
    trainer = Trainer(model, arguments, train_dataset=texts, data_collator=DataCollatorWithFlattening())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(SAVE) if SAVE.exists() else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small Llama on packed files.")
    parser.add_argument("--steps", type=int, default=100, help="in all, those before a resume included")
    train(**vars(parser.parse_args()))
