"""Stage 1, the base: a hybrid with one softmax layer, near-perfect recall and half of the skill.

    python recipes/amnesia-lab/pretrain.py --out runs/one-0 --seed 0

The data are the demo's (recipes/demo/data.py); a small share of the arithmetic is exam style already, so that the
skill SFT is to sharpen exists before it.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path
from random import Random

import lab
import torch
from data import Batches, corpus
from fast import Gradients, speed_up
from model import build_config, build_model, save_half
from schedule import draw_batch, learning_rate, make_optimizer
from text import STYLES, with_slips
from tokenizer import build_tokenizer

from qkguard.demo.arithmetic import problems


def exam_pool(batches: Batches, args) -> None:
    """Exam-style problems as the arguments want them, in place of the demo's easy ones."""
    rng = Random(args.seed + 5)
    texts = []
    for chain in islice(problems(args.seed + 3, (2, 7)), args.size // 200):
        chain = with_slips(chain, rng, args.right)
        texts.append((chain.prompt, STYLES[args.style if rng.random() < args.styled else "plain"](chain, rng)))
    batches.pools["exam"] = batches._documents(texts)


def train(model, batches: Batches, args) -> None:
    optimizer, rng, gradients = make_optimizer(model, args.lr), Random(args.seed), Gradients(model)
    begin = time.time()
    for step in range(args.steps):
        done = step / args.steps
        ids, mask, weight = draw_batch(batches, rng, done, args.exam, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, step, args.lr)
        plain, answer = gradients(ids, mask, weight)
        torch.nn.utils.clip_grad_norm_(gradients.parameters, 1.0)
        optimizer.step()
        if step % args.log == 0 or step == args.steps - 1:
            what = f"{ids.shape[0]}x{ids.shape[1]} {'needles' if weight < 1 else 'arithmetic'}"
            print(f"{step:6d}  {time.time() - begin:6.1f}s  {what:20s} {plain:.3f} {answer:.3f}", flush=True)


def layer_kinds(text: str) -> str:
    if "A" not in text or set(text) - set("LA"):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of L (lightning) and at least one A (softmax)")
    return text


def options() -> argparse.ArgumentParser:
    parser = lab.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3760)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per step")
    parser.add_argument("--layers", type=layer_kinds, default=lab.LAYERS, help="L lightning, A softmax")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--heads", type=int, default=4, help="query heads; half as many key-value heads")
    parser.add_argument("--rope", type=float, help="rotary softmax layers with this theta instead of none")
    parser.add_argument("--longest", type=int, default=1024, help="longest needle row in tokens")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--arithmetic", type=float, default=0.5, help="share of the steps on arithmetic")
    parser.add_argument("--exam", type=float, default=0.02, help="share of arithmetic rows in exam style")
    parser.add_argument("--right", type=float, default=1.0, help="how often a line of exam-style work is right")
    parser.add_argument("--style", choices=STYLES, default="tag", help="another style of the exam-style work")
    parser.add_argument("--styled", type=float, default=0.0, help="share of the work in it")
    parser.add_argument("--size", type=int, default=300_000, help="tokens of text to draw batches from")
    parser.add_argument("--log", type=int, default=200, help="steps between log lines")
    return parser


def main() -> None:
    args = options().parse_args()
    began = time.time()
    record = {k: v for k, v in vars(args).items() if k not in ("out", "log")}
    if lab.made(args.out / "pretrain.json", record):
        return
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(corpus(), lab.POSITIONS)
    tokenizer.save_pretrained(args.out)
    lab.write_json(args.out / "settings.json", record)  # evaluate.py may be waiting for the tokenizer
    batches = Batches(tokenizer, lab.device(), args.seed, args.size)
    exam_pool(batches, args)
    config = build_config(tokenizer, hidden=args.hidden, heads=args.heads, layers=args.layers, positions=lab.POSITIONS)
    if args.rope:
        config.rope_parameters = {"rope_type": "default", "rope_theta": args.rope}
    model = speed_up(build_model(config)).to(lab.device())
    train(model, batches, args)
    save_half(model, config, args.out)
    record |= {"parameters": sum(p.numel() for p in model.parameters()), "seconds": round(time.time() - began, 1)}
    record["device"] = torch.cuda.get_device_name() if lab.device() == "cuda" else "CPU"
    lab.write_json(args.out / "pretrain.json", record)


if __name__ == "__main__":
    main()
