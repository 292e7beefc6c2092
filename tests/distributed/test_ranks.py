"""Real processes: two launches, each running a list of cases (`worker.py`), one test per case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

LAUNCH_SECONDS = 1500  # a case that hangs ends its launch much sooner (worker.py)

CASES = {
    2: [
        "ranks_agree",
        "guarded@ddp,fp32,minimax",
        "guarded@ddp,bf16,qwen3_next",
        "guarded@zero1,fp32,minimax",
        "guarded@zero2,bf16,qwen3_next,default",
        "guarded@zero2,fp32,qwen3_next,trainer,offload",
        "guarded@zero3,fp32,minimax",
        "guarded@zero3,bf16,qwen3_next,default",
        "guarded@zero3,fp32,minimax,offload",
        "guarded@zero3,fp32,qwen3_next,offload,default",
        "guarded@zero3,fp32,minimax,nogather,default",
        "guarded@fsdp2,bf16,qwen3_next",
        "guarded@loaded_fsdp2,fp32,llama",
        "neutral@ddp,checkpointing",
        "neutral@zero2,default",
        "neutral@zero3,default,checkpointing",
        "resumed@ddp",
        "resumed@zero3,default",
        "resumed@fsdp2",
        "wrong_start",
        "random_mlp@ddp",
        "random_mlp@zero3",
        "random_mlp@zero3,default",
        "random_mlp@fsdp2",
        "renamed",
        "lora@ddp,phi3",
        "lora@zero2,phi3,dora",
        "lora@zero3,minimax,nogather",
        "lora@zero3,qwen3_next,dora,default",
        "lora@fsdp2,minimax",
        "lora_neutral@zero3,default",
        "lora_fsdp2",
        "lora_fsdp2@dora",
        "failing_write",
        "beside_training",
        "failing_page",
        "run_folder_elsewhere",
        "best_step@ddp",
        "best_step@zero3",
        "fsdp1",
        "failing_measurement",
        "failing_reference",
        "agreements",
        "agreements_beside",
        "trained_alike@zero3",
        "trained_alike@zero3,lora",
        "trained_alike@zero1",
        "trained_alike@zero2,lora",
        "trained_alike@ddp,dora",
        "trained_alike@fsdp2",
        "trained_alike@fsdp2,lora",
        "trained_alike@fsdp2,dora,older",
        "trained_alike@loaded_fsdp2,lora",
        "swapped@zero3",
        "swapped@zero3,qk-pro",
        "swapped@ddp",
        "swapped@fsdp2",
        "swapped@loaded_fsdp2,procrustes",
        "one_rank_fails",
        "retrieval@zero3",
        "retrieval@fsdp2",
        "retrieval@ddp,lora",
        "retrieval@ddp,dora,resume",
        "retrieval@zero3,resume",
        "verdict@ddp",
        "verdict@zero3,default",
        "verdict@zero2",
        "verdict@zero3,lora",
        "verdict@fsdp2",
        "launcher@ddp",
        "launcher@zero1",
        "launcher@zero2",
        "launcher@zero3",
        "launcher@fsdp2",
    ],
    3: [
        "guarded@ddp,fp32,minimax",
        "continued_elsewhere@2",
        "guarded@zero3,fp32,qwen3_next",
        "guarded@zero3,bf16,qwen3_next,default",
        "guarded@fsdp2,fp32,minimax",
        "guarded@loaded_fsdp2,fp32,llama",
        "lora_fsdp2@dora",
        "ranks_agree",
        "failing_write",
        "failing_page",
        "failing_measurement",
        "failing_reference",
        "agreements",
        "agreements_beside",
        "beside_training",
        "trained_alike@zero3",
        "trained_alike@fsdp2,lora",
        "verdict@zero3",
    ],
}


@pytest.fixture(scope="session")
def launches(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    logs = {}
    for size, names in CASES.items():
        out = root / str(size)
        out.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command += ["-m", "tests.distributed.worker", str(out), *names]
        log = root / f"{size}.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LAUNCH_SECONDS)
            finally:  # whatever ended the waiting, no rank stays behind
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        logs[size] = log
    return root, logs


@pytest.mark.timeout(2 * LAUNCH_SECONDS + 60)
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in CASES.items() for name in names])
def test_on_real_ranks(launches, size, name):
    root, logs = launches
    for rank in range(size):
        file = root / str(size) / f"{name}.{rank}.json"
        assert file.exists(), f"rank {rank} never finished it:\n{logs[size].read_text()[-4000:]}"
        result = json.loads(file.read_text())
        assert result["ok"], f"rank {rank}: {result['traceback']}"
