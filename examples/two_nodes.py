"""Full fine-tuning on two nodes. The same command on each, with its own --node-rank:

torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr node0 --master-port 29500 two_nodes.py MODEL ROWS
torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr node0 --master-port 29500 two_nodes.py MODEL ROWS

Without MODEL and ROWS a small hybrid that ships with qkguard learns generated arithmetic, on CPUs with
--nproc-per-node 1. The output folder lies on a file system that all nodes share; where each node has its own, add
save_on_each_node=True to the arguments.
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

args = SFTConfig(
    output_dir="out-two-nodes",
    max_steps=6 if small else -1,
    learning_rate=2e-3 if small else 1e-5,
    per_device_train_batch_size=4,
    max_length=256 if small else 4096,
    save_steps=6 if small else 0.2,
    logging_steps=2,
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows, callbacks=[QKGuardCallback()])
trainer.train()
if trainer.is_world_process_zero():
    print("restored:", f"{args.output_dir}/_qkguard/final/qk_restored")
