"""A few elements of every parameter, joined from all ranks: enough to tell loaded weights from random ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qkguard.distributed import collectives, ranks, sharding
from qkguard.distributed.collectives import Span
from qkguard.distributed.sharding import Param

RUNS, RUN_LENGTH = 8, 4  # spread over the parameter: a reader of the same elements on disk needs eight short reads
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ParamSample:
    """Elements of one parameter.

    Attributes:
        shape, dtype: of the whole parameter.
        spans: which of its flattened elements.
        values: 1-D, float64, which holds every value exactly.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: list[Span]
    values: Tensor


def sample_params(model: nn.Module) -> dict[str, ParamSample]:
    """Elements of every floating-point parameter, by name; ALL ranks must call this.

    Each rank looks at its own shards, and one all-reduce of a small vector (32 numbers for each parameter) joins them.
    Quantised parameters, and those whose placement is not supported, are left out.
    """
    params = {name: param for name, param in model.named_parameters() if _readable(param)}
    spans = {name: sample_spans(sharding.full_numel(param)) for name, param in params.items()}
    found = ranks.agree("sampling the starting weights", partial(_own_elements, params, spans))
    values = collectives.all_reduce_sum(found)
    samples, position = {}, 0
    for name, param in params.items():
        count = sum(stop - start for start, stop in spans[name])
        taken = values[position : position + count]
        samples[name] = ParamSample(sharding.full_shape(param), sharding.dtype(param), spans[name], taken)
        position += count
    return samples


def sample_spans(numel: int) -> list[Span]:
    """Eight short runs spread evenly over a flattened parameter; a small one whole."""
    if numel <= RUNS * RUN_LENGTH:
        return [(0, numel)]
    starts = [i * (numel - RUN_LENGTH) // (RUNS - 1) for i in range(RUNS)]
    return [(start, start + RUN_LENGTH) for start in starts]


def _readable(param: Param) -> bool:
    return sharding.dtype(param) in FLOATS and sharding.unsupported(param) is None


def _own_elements(params: dict[str, Param], spans: dict[str, list[Span]]) -> Tensor:
    """All samples one after the other: those in this rank's shards, zeros elsewhere. Every element has one owner."""
    out = torch.zeros(sum(stop - start for of_one in spans.values() for start, stop in of_one), dtype=torch.float64)
    position = 0
    for name, param in params.items():
        first, last = sharding.shard_span(param)
        places, pieces = [], []
        for start, stop in spans[name]:
            lo, hi = max(start, first), min(stop, last)
            if lo < hi:
                places.append(torch.arange(position + lo - start, position + hi - start))
                pieces.append(sharding.read(param, (lo, hi)))
            position += stop - start
        if pieces:
            out[torch.cat(places)] = torch.cat(pieces).to("cpu", torch.float64)
    return out
