"""Pretrain the demo's model: long-range recall first, book-style arithmetic beside it, a little exam style at the end.

    python recipes/demo/pretrain.py --out qkguard/demo/model

Several values of --exam give several models from one common trunk. README.md beside this file has the time, the seed
and what came out. A few steps on a CPU, as a check:

    python recipes/demo/pretrain.py --out /tmp/model --steps 3 --tokens 1024 --size 50000 --longest 256 --rows 4
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from data import Batches, corpus
from model import MAX_POSITIONS, build_config, build_model, save_half
from schedule import draw_batch, learning_rate, make_optimizer
from tokenizer import build_tokenizer
from torch import Tensor

from qkguard.demo.arithmetic import problems


def losses(model, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token loss of the ordinary tokens and of the answers."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    answer = mask[:, 1:].flatten()
    return each[~answer].mean(), each[answer].mean()


def train(model, optimizer, batches: Batches, rng: Random, args, steps: range, exam: float) -> None:
    """The given steps of the schedule, in place; `exam` is the share of arithmetic rows in exam style."""
    begin = time.time()
    for step in steps:
        done = step / args.steps
        ids, mask, weight = draw_batch(batches, rng, done, exam, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, step, args.lr)
        plain, answer = losses(model, ids, mask)
        (plain + weight * answer).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log == 0 or step == args.steps - 1:
            what = f"{ids.shape[0]}x{ids.shape[1]} {'needles' if weight < 1 else 'arithmetic'}"
            print(f"{step:6d}  {time.time() - begin:6.1f}s  {what:20s} {plain:.3f} {answer:.3f}", flush=True)


def train_forked(model, batches: Batches, args) -> Iterator[float]:
    """Train once up to `args.fork` without exam style, then to the end for every share in `args.exam`, yielding it.

    Each branch draws the same random numbers, so it ends where a run with that share alone would.
    """
    optimizer, rng = make_optimizer(model, args.lr), Random(args.seed)
    fork = round(args.fork * args.steps)
    train(model, optimizer, batches, rng, args, range(fork), 0.0)
    kept = deepcopy((model.state_dict(), optimizer.state_dict(), rng.getstate(), batches.generator.get_state()))
    for exam in args.exam:
        weights, moments, state, drawn = deepcopy(kept)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        rng.setstate(state)
        batches.generator.set_state(drawn)
        train(model, optimizer, batches, rng, args, range(fork, args.steps), exam)
        yield exam


@torch.no_grad()
def exact(model, ids: Tensor, mask: Tensor, tokens: int = 1 << 17) -> float:
    """Share of rows whose masked tokens are all arg-max given the true text before them."""
    right = []
    for part, marks in zip(
        ids.split(max(1, tokens // ids.shape[1])), mask.split(max(1, tokens // ids.shape[1])), strict=True
    ):
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda"):
            hidden = model.model(input_ids=part, use_cache=False).last_hidden_state[:, :-1]
            rows, columns = marks[:, 1:].nonzero(as_tuple=True)
            wrong = model.lm_head(hidden[rows, columns]).argmax(-1) != part[rows, columns + 1]
        right.append(torch.zeros(len(part), device=ids.device).index_add_(0, rows, wrong.float()) == 0)
    return torch.cat(right).float().mean().item()


def chains_of_thought(tokenizer, count: int, seed: int, device: str, lengths=(4, 7)) -> tuple[Tensor, Tensor]:
    """Exam problems as padded ids and completion mask, both (count, tokens)."""
    drawn = list(islice(problems(seed, lengths), count))
    prompts = tokenizer([c.prompt for c in drawn]).input_ids
    answers = tokenizer([c.completion + tokenizer.eos_token for c in drawn], add_special_tokens=False).input_ids
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((count, longest), tokenizer.pad_token_id)
    mask = torch.zeros(count, longest, dtype=torch.bool)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        mask[i, len(p) : len(p) + len(a)] = True
    return ids.to(device), mask.to(device)


def evaluate(model, tokenizer, batches: Batches, lengths: tuple[int, ...], rows: int) -> dict[str, float]:
    """Recall by haystack, number of needles and length; share of exam chains that are right to the last token."""
    model.eval()
    scores = {}
    for name, haystack, keys in (("S1", "noise", 1), ("S2", "prose", 1), ("MK1", "prose", 4)):
        for length in lengths:
            scores[f"{name}@{length}"] = exact(model, *batches.needles(rows, length, haystack, keys, 1))
    for lengths_ in ((2, 3), (4, 7)):
        scores["CoT {}-{}".format(*lengths_)] = exact(
            model, *chains_of_thought(tokenizer, 4 * rows, 4321, batches.device, lengths_)
        )
    model.train()
    return scores


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens per step")
    parser.add_argument("--longest", type=int, default=2048, help="longest needle row in tokens")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--arithmetic", type=float, default=0.5, help="share of the steps on arithmetic")
    parser.add_argument("--exam", type=float, nargs="+", default=[0.2], help="share of arithmetic rows in exam style")
    parser.add_argument("--fork", type=float, default=0.75, help="share of training after which exam style begins")
    parser.add_argument("--size", type=int, default=600_000, help="tokens of text to draw batches from")
    parser.add_argument("--rows", type=int, default=128, help="samples of each kind for the final evaluation")
    parser.add_argument("--log", type=int, default=200, help="steps between log lines")
    return parser


def main() -> None:
    args = options().parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(corpus(), MAX_POSITIONS)
    batches = Batches(tokenizer, device, args.seed, args.size)
    model = build_model(build_config(tokenizer, block_size=256)).to(device)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, on {device}", flush=True
    )
    lengths = tuple(n for n in (256, 512, 1024, 2048, 4096, 8192) if n <= 4 * args.longest)
    for exam in train_forked(model, batches, args):
        out = args.out / f"exam-{exam}" if len(args.exam) > 1 else args.out
        save_half(model, build_config(tokenizer), out)
        tokenizer.save_pretrained(out)
        scores = evaluate(model, tokenizer, batches, lengths, args.rows)
        print(out, json.dumps(scores), flush=True)


if __name__ == "__main__":
    main()
