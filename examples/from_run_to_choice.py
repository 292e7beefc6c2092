# %% [markdown]
# # From a guarded run to the choice
#
# A small hybrid is fine-tuned on worked arithmetic under the guard. Then: how far queries and keys moved, what that
# did to recall, which model the verdict recommends, what a sweep over more restores adds, and the chosen model at
# work.
#
# It takes about two minutes on two CPU cores and needs no download: the model ships with qkguard. What to change for a
# model and rows of your own is marked.

# %%
import json
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib import pyplot
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import qkguard
from qkguard import QKGuardCallback
from qkguard.demo import MODEL
from qkguard.demo.arithmetic import problems

model = str(MODEL)  # yours: a folder or a hub id
chains = list(islice(problems(seed=0), 512))  # yours: rows with these two columns
rows = Dataset.from_list([{"prompt": chain.prompt, "completion": chain.completion} for chain in chains])
texts = [row["prompt"] + row["completion"] for row in rows]
Path("haystack.txt").write_text("\n".join(texts))
print(texts[0])

# %% [markdown]
# ## Train under the guard
#
# One line is new to a script of TRL's: the callback. It probes recall before the first step, measures drift as the
# model trains, and measures raw and restored weights when training ends. `probe_budget=None` lets probes take as long
# as they need; by default they get 2% of the training time, which is little in a training of seconds. Needles are
# hidden in the text of the training, as they are by default; it is in a file here so that the sweep below can hide
# them in the same, for recall depends on the text around a needle.

# %%
gpu = torch.cuda.is_available()
args = SFTConfig(
    output_dir="run",
    max_steps=60,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    lr_scheduler_type="linear",
    eval_strategy="steps",  # the verdict measures the task on the evaluation set of a run that evaluates
    eval_steps=30,
    logging_steps=20,
    save_strategy="no",
    gradient_checkpointing=False,
    bf16=gpu,
    use_cpu=not gpu,
    disable_tqdm=True,
    report_to="none",
    model_init_kwargs={"experts_implementation": "eager"},  # twice as fast for this model on a CPU; not for yours
)
guard = QKGuardCallback(
    drift_steps=5,
    probe_steps=30,
    probe_lengths=[256, 512],
    probe_tasks=["single_2", "multikey_1"],
    probe_budget=None,
    haystack="haystack.txt",
)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=rows.select(range(480)),
    eval_dataset=rows.select(range(480, 512)),
    callbacks=[guard],
)
trainer.train()
print(*sorted(str(path) for path in Path("run/_qkguard").iterdir()), sep="\n")

# %% [markdown]
# ## Drift and recall
#
# `metrics.jsonl` holds every metric, one JSON object a line, with or without a tracker. Drift says how far queries and
# keys are from where they were before training; recall is the share of needles found. Drift alone is no loss: look at
# both.

# %%
metrics = [json.loads(line) for line in Path("run/_qkguard/metrics.jsonl").read_text().splitlines()]
figure, (drift, recall) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
curves = [
    (drift, "qkguard/drift/q_rel", "queries"),
    (drift, "qkguard/drift/k_rel", "keys"),
    (recall, "qkguard/niah/recall", "in training"),
    (recall, "qkguard/niah_restored/recall", "queries and keys restored"),
]
for axis, key, label in curves:
    points = [(row["step"], row[key]) for row in metrics if key in row]
    axis.plot(*zip(*points, strict=True), marker="o", label=label)
drift.set(xlabel="step", ylabel="relative drift")
recall.set(xlabel="step", ylabel="recall", ylim=(-0.03, 1.03))
drift.legend()
recall.legend()
pyplot.show()

# %% [markdown]
# ## The verdict
#
# When training ends, raw and three restores are measured in the live model: recall on the same samples, and the loss
# of the evaluation set. `RECOMMENDED` names the folder beside it to take. `report.html` shows all of it on one page.

# %%
verdict = next(row["verdict"] for row in reversed(metrics) if row.get("verdict"))
for point in verdict["points"]:
    loss = "" if point["task"] is None else f"task loss {point['task']['loss']:.4f}"
    print(f"{point['name']:25} recall {point['recall']['value']:.2f}   {loss}")
print(*verdict["words"], sep="\n")
print("RECOMMENDED:", Path("run/_qkguard/final/RECOMMENDED").read_text().strip())

# %% [markdown]
# ## The sweep
#
# The verdict looks at few points. With both checkpoints on disk, a sweep looks at as many as you like, also at single
# projections as controls: where values and outputs bring back as much as queries and keys, these are not the cause. It
# takes the rows that the run kept of its evaluation set; `data="heldout.jsonl"` gives it others.

# %%
base, tuned = model, "run/_qkguard/final/raw"
grid = ["restore", "restore:projections=k", "qk-pro:ridge=10", "interpolate:alpha=0.5"]
report = qkguard.sweep(
    base,
    tuned,
    methods=grid,
    controls="v",
    lengths=[256, 512],
    tasks=["single_2", "multikey_1"],
    haystack="haystack.txt",
)
for point in report.points:
    loss = "" if point.task is None else f"task loss {point.task.loss:.4f}"
    print(f"{point.name:25} recall {point.recall.value:.2f}   {loss}")
print(*report.words, sep="\n")

# %% [markdown]
# ## Pick one, and load it
#
# The recommended point is written as a folder that loads as any other; `verify` proves that nothing but queries and
# keys differs from the raw one. Where raw is recommended there is nothing to write, and raw is the model to ship.

# %%
chosen, picked = tuned, report.recommended.candidate
if picked.recommendable:
    chosen = "chosen"
    projections = "".join(picked.tensors)
    qkguard.restore_checkpoint(
        base, tuned, chosen, method=picked.method, projections=projections, overwrite=True, **picked.options
    )
    found = qkguard.verify(chosen, load=True)
    print(f"{found['layers']} layers restored by {found['method']}, raw files {found['raw']}")
print(f"{report.recommended.name}: {chosen}")

# %%
tokenizer = AutoTokenizer.from_pretrained(chosen)
answering = AutoModelForCausalLM.from_pretrained(chosen)
question = next(problems(seed=7))  # not among the rows
tokens = tokenizer(question.prompt, return_tensors="pt")
written = answering.generate(**tokens, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
print("expected:", question.completion.splitlines()[-1])
