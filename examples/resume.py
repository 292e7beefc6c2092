"""A run that stops and goes on: the reference from before the first step is read again and verified, never retaken.

python resume.py                              # a small hybrid that ships with qkguard, seconds on a CPU
python resume.py Qwen/Qwen3-0.6B rows.jsonl   # your model and rows: messages, or prompt and completion
"""

import sys
from itertools import islice

import torch
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from qkguard import QKGuardCallback
from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems

model = sys.argv[1] if len(sys.argv) > 1 else str(MODEL)
small = model == str(MODEL)
if len(sys.argv) > 2:
    rows = load_dataset("json", data_files=sys.argv[2], split="train")
else:
    chains = islice(problems(seed=1), 240)
    rows = Dataset.from_list([{"prompt": chain.prompt, "completion": chain.completion} for chain in chains])


def train(steps: int, resume: bool) -> None:
    """One start of the same script; each has a guard of its own."""
    args = SFTConfig(
        output_dir="out-resume",
        max_steps=steps,
        learning_rate=2e-3 if small else 1e-5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        max_length=256 if small else 4096,
        save_steps=5,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, callbacks=[QKGuardCallback()])
    trainer.train(resume_from_checkpoint=resume)


train(steps=5, resume=False)
train(steps=8, resume=True)
# out-resume/_qkguard/metrics.jsonl holds the rows of both starts, reference.safetensors beside it is the first's
