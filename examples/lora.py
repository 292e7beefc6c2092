"""LoRA under the guard: the adapter, the adapter without queries and keys, and both merged.

python lora.py                              # a small hybrid that ships with qkguard, a minute on a CPU
python lora.py Qwen/Qwen3-0.6B rows.jsonl   # your model and rows: messages, or prompt and completion
"""

import sys
from itertools import islice

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
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

args = SFTConfig(
    output_dir="out-lora",
    max_steps=8 if small else -1,
    learning_rate=1e-2 if small else 1e-4,
    per_device_train_batch_size=4,
    max_length=256 if small else 4096,
    save_steps=8 if small else 0.2,
    logging_steps=2,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=rows,
    peft_config=LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    ),
    callbacks=[QKGuardCallback(merge_at_end=True)],
)
trainer.train()
# out-lora/checkpoint-N/qk_restored/default                     the adapter without its queries and keys: PEFT loads it
# out-lora/_qkguard/final/{merged_raw,merged_qk_restored}       whole models, streamed from the base model's files
