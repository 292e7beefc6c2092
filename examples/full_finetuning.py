"""Full fine-tuning under the guard.

python full_finetuning.py                              # a small hybrid that ships with qkguard, a minute on a CPU
python full_finetuning.py Qwen/Qwen3-0.6B-Base         # your model, on generated arithmetic
python full_finetuning.py Qwen/Qwen3-0.6B rows.jsonl   # your model and rows: messages, or prompt and completion
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
    chains = islice(problems(seed=1), 120)
    rows = Dataset.from_list([{"prompt": chain.prompt, "completion": chain.completion} for chain in chains])
halves = rows.train_test_split(test_size=0.1, seed=0)

args = SFTConfig(
    output_dir="out-full",
    max_steps=12 if small else -1,
    learning_rate=2e-3 if small else 1e-5,
    per_device_train_batch_size=4,
    max_length=256 if small else 4096,
    eval_strategy="steps",
    eval_steps=6 if small else 0.2,
    save_steps=6 if small else 0.2,
    logging_steps=2,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=halves["train"],
    eval_dataset=halves["test"],  # the verdict when training ends measures the task on these
    callbacks=[QKGuardCallback()],
)
trainer.train()
# out-full/checkpoint-N/qk_restored                 every save with the queries and keys from before SFT
# out-full/_qkguard/final/{raw,qk_restored}         both models of the last step
# out-full/_qkguard/final/RECOMMENDED, report.html  which one to take, and why
