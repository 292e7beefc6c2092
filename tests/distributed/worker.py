"""Runs a list of named cases on every rank of one torchrun launch; a launch costs more than most cases.

    torchrun --nproc_per_node 2 -m tests.distributed.worker OUT CASE [CASE ...]

Every rank writes OUT/<case>.<rank>.json: "ok" or the traceback. A case that fails or hangs ends the launch: the other
ranks may be anywhere.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
START_SECONDS = 300  # imports, on a busy machine
CASE_SECONDS = 150
PICTURED = ("guarded@ddp", "failing_page", "verdict@ddp", "launcher@ddp", "lora@ddp")
"""Cases whose pages have pictures, which rank 0 draws like any process; in all they took a quarter of a launch."""


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    import deepspeed
    import torch.distributed as dist

    from tests.distributed import (
        cases,
        failing_cases,
        lora_cases,
        place_cases,
        probe_cases,
        probing_cases,
        sft_cases,
        start_cases,
        verdict_cases,
    )
    from tests.distributed.launch import wait_for_every_gather
    from tests.support.pictures import small_pictures

    modules = (
        verdict_cases,
        start_cases,
        failing_cases,
        sft_cases,
        place_cases,
        probing_cases,
        probe_cases,
        lora_cases,
        cases,
    )
    known = {name: value for module in modules for name, value in vars(module).items()}
    rank = int(os.environ["RANK"])
    deepspeed.init_distributed("gloo", verbose=False)  # torch's process group, known to DeepSpeed as well
    wait_for_every_gather()
    for name in names:
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        started = time.perf_counter()
        case, _, options = name.partition("@")
        gc.collect()
        gc.freeze()  # trainers and DeepSpeed collect garbage often, and would go through all that is old each time
        try:
            cases.reset()
            with nullcontext() if name.startswith(PICTURED) else small_pictures():
                known[case](out / name, *[o for o in options.split(",") if o])
            result = {"ok": True}
        except BaseException:
            result = {"ok": False, "traceback": traceback.format_exc()}
        faulthandler.cancel_dump_traceback_later()
        (out / f"{name}.{rank}.json").write_text(json.dumps(result | {"seconds": time.perf_counter() - started}))
        if not result["ok"]:
            print(f"rank {rank}: {name} failed\n{result['traceback']}", file=sys.stderr, flush=True)
            time.sleep(1)  # the others may be about to report the same failure
            os._exit(1)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
