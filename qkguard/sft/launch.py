"""`accelerate launch` with a bundled config, on all local accelerators or on CPU processes."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qkguard.errors import QKGuardError
from qkguard.sft.recipes import recipes_folder

SHARDED = ("zero3", "fsdp2")  # pointless, and for ZeRO-3 harmful, in one process


@dataclass(frozen=True)
class Launch:
    """How to start the ranks.

    Attributes:
        config: name of a bundled accelerate config, or the path of one's own.
        processes: ranks on this node; None is every accelerator.
        nodes, node_rank, main_ip, main_port: as accelerate's num_machines, machine_rank and main_process_*.
    """

    config: str
    processes: int | None = None
    nodes: int = 1
    node_rank: int = 0
    main_ip: str | None = None
    main_port: int | None = None

    @property
    def name(self) -> str:
        return Path(self.config).stem


def bundled_configs() -> dict[str, Path]:
    """Name -> file of every accelerate config that ships with the recipes."""
    return {file.stem: file for file in sorted((recipes_folder() / "accelerate_configs").glob("*.yaml"))}


def config_file(launch: Launch) -> Path:
    """The accelerate config.

    Raises:
        QKGuardError: there is none of that name.
    """
    known = bundled_configs()
    file = known.get(launch.config) or Path(launch.config)
    if not file.is_file():
        raise QKGuardError(
            f"--accelerate {launch.config} is neither a bundled config ({', '.join(known)}) nor a file."
        )
    return file


def devices() -> int:
    """Local accelerators; 0 where there is only a CPU."""
    import torch  # seconds, and a wrong setting is refused before

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def ranks_per_node(launch: Launch) -> int:
    """Processes to start here.

    Raises:
        QKGuardError: none is asked for and there is no accelerator, or a sharded config would get one process.
    """
    config_file(launch)
    if launch.name == "single":
        if launch.processes not in (None, 1):
            raise QKGuardError(
                f"--accelerate single runs one process, --num-processes {launch.processes} was asked for; use ddp, "
                "zero1, zero2, zero3 or fsdp2"
            )
        return 1
    count = launch.processes or devices()
    if count == 0:
        raise QKGuardError(
            f"--accelerate {launch.name} starts a process for every accelerator, and none was found; say how many CPU "
            "processes with --num-processes, or use --accelerate single."
        )
    if count * launch.nodes == 1 and launch.name in (*SHARDED, "ddp"):
        seen = f"--num-processes {launch.processes}" if launch.processes else "one accelerator was found"
        raise QKGuardError(
            f"--accelerate {launch.name} spreads a model over several processes, but there is only one ({seen}); use "
            "--accelerate single, or more processes"
        )
    return count


def launch_command(
    launch: Launch, arguments: Sequence[str], precision: str = "bf16"
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts all local ranks of `python -m qkguard sft ARGUMENTS`, and its environment.

    Args:
        launch: how to start them.
        arguments: of `qkguard sft`.
        precision: "bf16", "fp16" or "no", as the training's settings say: DeepSpeed refuses two opinions.

    Raises:
        QKGuardError: an unknown config, too few processes or an incomplete multi-node setting.
    """
    file = config_file(launch)
    count = ranks_per_node(launch)
    if launch.nodes > 1 and not launch.main_ip:
        raise QKGuardError(
            f"--nodes {launch.nodes} needs --main-process-ip (the first node's address), and --node-rank on each node"
        )
    if "deepspeed" in file.read_text(encoding="utf-8").lower() and importlib.util.find_spec("deepspeed") is None:
        raise QKGuardError(f"--accelerate {launch.name} needs DeepSpeed: pip install 'qkguard[deepspeed]'")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--num_processes", str(count * launch.nodes), "--num_machines", str(launch.nodes)]
    command += ["--machine_rank", str(launch.node_rank), "--mixed_precision", precision]
    if launch.main_ip:
        command += ["--main_process_ip", launch.main_ip]
    port = launch.main_port if launch.main_port is not None else (0 if launch.nodes == 1 else 29500)  # 0: a free one
    command += ["--main_process_port", str(port)]
    environment = dict(os.environ)
    if launch.name == "single" and devices() > 1:  # one process that sees several would run nn.DataParallel
        visible = environment.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    return [*command, "-m", "qkguard", "sft", *arguments], environment


def refuse_data_parallel(use_cpu: bool) -> None:
    """Refuse a plain start with several accelerators: it would train under nn.DataParallel."""
    if "LOCAL_RANK" not in os.environ and not use_cpu and devices() > 1:
        raise QKGuardError(
            f"{devices()} accelerators are visible and no launcher was asked for; add --accelerate zero3 (or zero2, "
            "fsdp2, ddp), or --accelerate single for one of them"
        )


def check_zero3(world_size: int) -> None:
    """Refuse ZeRO-3 in one process, unless it offloads: it saves nothing there."""
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    if world_size > 1 or not is_deepspeed_zero3_enabled():
        return
    zero = (deepspeed_config() or {}).get("zero_optimization", {})
    offloads = [(zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("param", "optimizer")]
    if set(offloads) == {"none"}:
        raise QKGuardError(
            "ZeRO-3 spreads a model over several processes, but there is only one; use --accelerate single, or more "
            "processes"
        )
