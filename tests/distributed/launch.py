"""What `accelerate launch` hands to a rank, for ranks that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from packaging.version import Version

from qkguard.sft.launch import Launch, launch_command


def environment(name: str, arguments: list[str]) -> dict[str, str]:
    """What `accelerate launch` sets for the ranks of a bundled config."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command, _ = launch_command(Launch(name, processes=dist.get_world_size()), arguments, "no")
    args = launch_command_parser().parse_args(command[command.index("--config_file") :])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
        wanted = prepare_deepspeed_cmd_env(args)[1]
    else:
        wanted = prepare_multi_gpu_env(args)
    return {key: value for key, value in wanted.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def wait_for_every_gather() -> None:
    """DeepSpeed before 0.19.8 waits for the last of several gathers; gloo's others may not be done by then."""
    import deepspeed
    from deepspeed import comm

    if Version(deepspeed.__version__) >= Version("0.19.8"):
        return
    gather = comm.all_gather_into_tensor

    def waited(*args: Any, **options: Any) -> Any:
        handle = gather(*args, **options)
        if handle is not None:
            handle.wait()
        return handle

    comm.all_gather_into_tensor = waited


def sharded_at_loading(base: Path) -> Any:
    """A model that transformers itself shards by FSDP2 while it loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(base, distributed_config=config)


def sharding_of(backend: str) -> AbstractContextManager[None]:
    """What a case's trainer needs around it: for "fsdp2" the bundled config, nothing for the others."""
    return launched("fsdp2") if backend == "fsdp2" else nullcontext()


@contextmanager
def launched(name: str, arguments: Sequence[str] = ()) -> Iterator[None]:
    """The environment of a bundled config. FSDP2 shards on these CPUs, where accelerate by itself makes DDP of it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(name, list(arguments)).items():
            patch.setenv(key, value)
        if name == "fsdp2":
            on_accelerators = ("gloo", DistributedType.MULTI_GPU)
            patch.setattr(PartialState, "_prepare_backend", lambda *args, **options: on_accelerators)
            patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        yield
