"""`qkguard merge` as typed, and what `restore` says of adapters."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qkguard import verify
from tests.support import oracle
from tests.support.lora import LINEAR, expected_merge, peft_merge, save_adapter
from tests.support.models import tiny_model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = tmp_path / "base"
    tiny_model("minimax").save_pretrained(base)  # type: ignore[operator]
    return base, save_adapter(base, tmp_path / "adapter", target_modules=LINEAR)


def test_merge_writes_what_it_says(run, pair, tmp_path):
    base, adapter = pair
    wanted = expected_merge("minimax", base, peft_merge(base, adapter, tmp_path / "peft"))
    code, out, err = run("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "2 of 2 softmax-attention layers left out" in out and "moves queries by" in out
    assert not oracle.differences(oracle.load_folder(tmp_path / "out"), wanted)
    verify(tmp_path / "out", full=True)
    code, out, err = run("merge", "-b", base, "-a", adapter, "-o", tmp_path / "json", "--keep-qk", "--json")
    assert code == 0 and json.loads(out)["method"]["keep_qk"] is True
    assert not oracle.differences(oracle.load_folder(tmp_path / "json"), oracle.load_folder(tmp_path / "peft"))
    code, out, err = run("merge", "-b", base, "-a", adapter, "-o", tmp_path / "out")
    assert code == 2 and "--overwrite" in err and err.count("\n") == 1
    code, out, err = run("merge", "-b", base, "-a", base, "-o", tmp_path / "other")
    assert code == 2 and "not a PEFT adapter" in err and err.count("\n") == 1


def test_restore_of_adapters_names_the_command_that_does_it(run, pair, tmp_path):
    base, adapter = pair
    for first, second in ((adapter, save_adapter(base, tmp_path / "second", target_modules=LINEAR)), (base, adapter)):
        code, _, err = run("restore", "--base", first, "--tuned", second, "--out", tmp_path / "out")
        assert code == 2 and f"qkguard merge --base BASE --adapter {second}" in err, err
    run("merge", "-b", base, "-a", adapter, "-o", tmp_path / "whole", "--keep-qk")
    assert run("restore", "-b", base, "-t", tmp_path / "whole", "-o", tmp_path / "restored")[0] == 0
    run("merge", "-b", base, "-a", adapter, "-o", tmp_path / "merged")
    left, right = (oracle.load_folder(tmp_path / p) for p in ("restored", "merged"))
    assert not oracle.differences(left, right), "base + merged model gives what merging without queries and keys gives"


@pytest.mark.parametrize("command", ["merge", "sweep"])
def test_threads_sleep_unless_the_user_has_them_spin(
    run: Any, command: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    other = ["--adapter", adapter, "--out", base] if command == "merge" else ["--tuned", adapter]
    for theirs, wanted in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if theirs is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", theirs)
        assert run(command, "--base", base, *other)[0] == 2, "refused, but set up by then"
        assert os.environ["OMP_WAIT_POLICY"] == wanted


CHURN = """
import ctypes, resource, sys
from qkguard.cli.output import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    memory = c.malloc(64 << 20)
    c.memset(memory, 1, 64 << 20)
    c.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other ways")
def test_memory_of_large_tensors_is_used_again() -> None:
    """Page faults of five blocks of 64 MB, one after the other: those of one block, or of five."""
    keep, give_back = (
        int(subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    )
    assert 3 * keep < give_back
