"""Text files -> a small Llama, trained by Transformers' Trainer on packed documents. Copy it, and change what is yours.

Run: python -m maskflash.examples.train_transformers --steps 100 (then with more steps, to go on where it ended)
It needs transformers and accelerate: `pip install 'maskflash[transformers]' accelerate`.
"""

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from maskflash.integrations.transformers import register


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return the losses that the trainer has logged, a step each."""
    parser = argparse.ArgumentParser(description="Train a small Llama on packed files.")
    parser.add_argument("--folder", type=Path, default=Path(sysconfig.get_path("stdlib")), help="of the files")
    parser.add_argument("--longest", type=int, default=2000, help="bytes of a document")
    parser.add_argument("--batch", type=int, default=8, help="documents of a step, packed into one row")
    parser.add_argument("--steps", type=int, default=100, help="in all, those before a resume included")
    parser.add_argument("--workers", type=int, default=2, help="processes that pack")
    parser.add_argument("--save", type=Path, default=Path("train_transformers"), help="folder of checkpoints")
    options = parser.parse_args(argv)

    register()  # from here on, models take attn_implementation="mf"
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "max_position_embeddings": options.longest}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False, attn_implementation="mf"))
    files = sorted(path for path in options.folder.glob("*.py") if path.stat().st_size)
    texts = [{"input_ids": list(path.read_bytes()[: options.longest])} for path in files]
    arguments = TrainingArguments(
        output_dir=str(options.save),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=2e-3,
        bf16=True,
        activation_checkpointing=True,
        dataloader_num_workers=options.workers,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_steps=50,
        report_to="none",
        disable_tqdm=True,
    )
    # The collator lays documents end to end, and starts their positions again: that is all maskflash needs.
    trainer = Trainer(model, arguments, train_dataset=texts, data_collator=DataCollatorWithFlattening())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.save) if options.save.exists() else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
