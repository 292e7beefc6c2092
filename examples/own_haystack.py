"""Needles hidden in a text of your own: the kind of document that the model must still read after SFT.

python own_haystack.py                                        # a small hybrid that ships with qkguard, on a CPU
python own_haystack.py Qwen/Qwen3-0.6B-Base contracts.txt     # your model, your text (.txt, .md, .json or .jsonl)
"""

import sys
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qkguard import QKGuardCallback
from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems

model = sys.argv[1] if len(sys.argv) > 1 else str(MODEL)
small = model == str(MODEL)
if len(sys.argv) > 2:
    haystack = Path(sys.argv[2])
else:
    haystack = Path("haystack.txt")
    lines = [f"Item {n} of the list was counted in room {n % 7} and found complete." for n in range(400)]
    haystack.write_text(" ".join(lines), encoding="utf-8")

chains = islice(problems(seed=1), 120)
args = SFTConfig(
    output_dir="out-haystack",
    max_steps=6,
    learning_rate=2e-3 if small else 1e-5,
    per_device_train_batch_size=4,
    max_length=256,
    save_strategy="no",
    logging_steps=2,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
)
guard = QKGuardCallback(haystack=haystack, probe_lengths=[512, 1024], probe_depths=5)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=Dataset.from_list([{"prompt": c.prompt, "completion": c.completion} for c in chains]),
    callbacks=[guard],
)
trainer.train()
# the same text for finished models: qkguard probe out-haystack/_qkguard/final/raw --haystack haystack.txt
