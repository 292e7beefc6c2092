"""`verify`: is a restored folder still what its manifest says, and is the raw one still what it was made from?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkguard.adapters.verify import verify_adapter
from qkguard.arrays import sha256_of
from qkguard.checkpoint.manifest import MANIFEST, describe_file, load_manifest
from qkguard.checkpoint.safetensors_io import Header, opened, read_exactly, read_header
from qkguard.checkpoint.weights import WeightFolder, open_weights, refuse_temporary, resolve_folder
from qkguard.errors import QKGuardError
from qkguard.layout.spec import Block, ParamMap
from qkguard.layout.wrappers import wrapped_names
from qkguard.offline.whole import folder_loading, what_fails

COMPARE_BYTES = 8 << 20


def verify(
    folder: str | os.PathLike[str],
    *,
    raw: bool = True,
    full: bool = False,
    load: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check a restored folder against its manifest, and the raw folder it was made from where that still exists.

    Args:
        folder: the restored checkpoint.
        raw: also check the raw folder: sizes, header hashes, sampled bytes and the hashes of the replaced rows.
        full: compare every byte outside the restored rows with the raw files (reads both whole).
        load: also load the folder as `from_pretrained` does, on the meta device and without reading a weight: every
            parameter must find its tensor. An adapter is put on the base it names.
        trust_remote_code: allow the model's own code to be imported for that.

    Returns:
        A report: folder, method, base, tensors, layers, files, bytes restored, raw ("unchanged", "not found" or "not
        checked"), loads (how many parameters were filled; None without `load`), partial, warnings.

    Raises:
        QKGuardError: no or an unreadable manifest, a missing, truncated or changed file, rows with another hash, a
            raw folder that has changed since, or with `load` parameters that would stay random.
    """
    path = Path(folder)
    refuse_temporary(path)
    manifest = load_manifest(path)
    try:
        if manifest.get("kind") == "adapter":
            report = verify_adapter(path, manifest, raw=raw)
        else:
            report = _verify(path, manifest, raw=raw, full=full)
    except (KeyError, TypeError, AttributeError) as error:
        raise QKGuardError(f"{path / MANIFEST} is damaged ({error!r}). Restore it again.") from None
    report["loads"] = None
    if load:
        check = _load_adapter if manifest.get("kind") == "adapter" else _load_model
        report["loads"], unused = check(path, trust_remote_code)
        if unused:
            report["warnings"] = [*report["warnings"], f"{len(unused)} tensors find no parameter, first {unused[0]}"]
    return report


def _load_model(path: Path, trust_remote_code: bool) -> tuple[int, list[str]]:
    """(parameters filled, tensors that find no parameter) of a full model loaded on the meta device."""
    loading = folder_loading(open_weights(path), trust_remote_code=trust_remote_code)
    if loading is None:
        raise QKGuardError(f"{path}: loading cannot be checked, because the model's code is not part of transformers.")
    if problem := what_fails(loading):
        raise QKGuardError(f"{path} {problem}. Restore it again, from a checkpoint that loads whole.")
    return loading.parameters, loading.unused


def _load_adapter(path: Path, trust_remote_code: bool) -> tuple[int, list[str]]:
    """The same of an adapter put on its base's class by PEFT; a tensor without a place is refused there."""
    from qkguard.adapters.files import open_adapter
    from qkguard.adapters.meta_model import MetaPeftModel

    adapter = open_adapter(path, merging=False)
    if adapter.base is None:
        raise QKGuardError(f"{path} names no base model, so loading cannot be checked.")
    revision = adapter.config.get("revision")
    base = adapter.base if revision is None or os.path.isdir(adapter.base) else f"{adapter.base}@{revision}"
    MetaPeftModel(resolve_folder(base), adapter, trust_remote_code=trust_remote_code)
    return len(adapter.shapes), []


def _verify(path: Path, manifest: Mapping[str, Any], *, raw: bool, full: bool) -> dict[str, Any]:
    for name in manifest["companions"]:
        if not (path / name).is_file():
            raise QKGuardError(f"{path} lacks {name}, which it was written with. Restore it again.")
    headers = _check_files(path, manifest["files"], "Restore it again.")
    weights = open_weights(path, headers)
    if extra := sorted(set(weights.files) - set(manifest["files"])):
        raise QKGuardError(f"{path / extra[0]} is not in {MANIFEST}: something else was saved here. Restore it again.")
    _check_rows(weights, manifest["tensors"], "after", "Restore it again.")

    found = path / manifest["raw"]["path"]
    state = "not found" if raw else "not checked"
    if raw and any((found / name).is_file() for name in manifest["raw"]["files"]):
        advice = "The raw checkpoint has changed since; restore it again, or leave it out (--no-raw) if it may."
        headers = _check_files(found, manifest["raw"]["files"], advice)
        before = [tensor | {"name": tensor.get("raw_name", tensor["name"])} for tensor in manifest["tensors"]]
        _check_rows(open_weights(found, headers), before, "before", advice)
        state = "unchanged"
    if full:
        _check_carried(weights, manifest.get("carried", ()))
        if state != "unchanged":
            raise QKGuardError(f"There is no raw checkpoint at {found} to compare every byte with.")
        _compare_whole(found, headers, weights, manifest)
    return {
        "folder": str(path),
        "base": manifest["base"].get("id"),
        "method": manifest["method"]["name"],
        "layers": len(manifest["layers"]),
        "tensors": len(manifest["tensors"]),
        "restored_bytes": sum(_nbytes(weights, t) for t in manifest["tensors"]),
        "files": len(manifest["files"]),
        "carried": len(manifest.get("carried", ())),
        "raw": state,
        "compared": "every byte" if full else "restored rows and samples",
        "partial": manifest["partial"],
        "warnings": manifest["warnings"],
    }


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], advice: str) -> dict[str, Header]:
    """Refuse a file that is not as recorded; the headers read on the way."""
    headers = {}
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise QKGuardError(f"{file} is missing. {advice}")
        size = file.stat().st_size
        if size != expected["size"]:
            raise QKGuardError(f"{file} has {size} bytes, expected {expected['size']}. {advice}")
        headers[name] = read_header(file)
        found = describe_file(file, headers[name])
        for key, what in (("header_sha256", "header"), ("sample_sha256", "content")):
            if found[key] != expected[key]:
                raise QKGuardError(f"{file} has another {what} than recorded. {advice}")
    return headers


def _check_rows(weights: WeightFolder, tensors: list[dict[str, Any]], which: str, advice: str) -> None:
    for tensor in tensors:
        name = tensor["name"]
        if name not in weights.where:
            raise QKGuardError(f"{weights.folder} has no {name}. {advice}")
        if sha256_of(weights.read(name, _param(tensor))) != tensor[f"sha256_{which}"]:
            file = weights.folder / weights.where[name]
            raise QKGuardError(f"{file}: the rows of {name} differ from those recorded. {advice}")


def _check_carried(weights: WeightFolder, carried: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a tensor carried over from the base that has other bytes than recorded."""
    for tensor in carried:
        file, name = weights.folder / tensor["file"], tensor["name"]
        entry = weights.files[tensor["file"]].tensors.get(name)
        if entry is None or _sha256_of_range(file, entry.start, entry.stop) != tensor["sha256"]:
            raise QKGuardError(f"{file}: {name} differs from what was carried over from the base. Restore it again.")


def _sha256_of_range(file: Path, start: int, stop: int) -> str:
    digest = sha256()
    with opened(file) as fd:
        for position in range(start, stop, COMPARE_BYTES):
            piece = bytearray(min(COMPARE_BYTES, stop - position))
            read_exactly(fd, memoryview(piece), position, file.name)
            digest.update(piece)
    return digest.hexdigest()


def _param(tensor: Mapping[str, Any]) -> ParamMap:
    """The recorded rows as a parameter map, under the tensor's name on disk."""
    blocks = tuple(Block(lo, hi, "q") for lo, hi in tensor["ranges"])
    return ParamMap(tensor["name"], tuple(tensor["shape"]), tensor["dim"], tensor["kind"], blocks)


def _nbytes(weights: WeightFolder, tensor: Mapping[str, Any]) -> int:
    return _param(tensor).numel * weights.dtype(tensor["name"]).itemsize


def _compare_whole(
    raw: Path, headers: Mapping[str, Header], weights: WeightFolder, manifest: Mapping[str, Any]
) -> None:
    """Every byte of every weight file, but for the restored rows, is the raw file's."""
    for name, described in manifest["files"].items():
        source, file = described.get("from", name), weights.folder / name
        if source is None:  # a file that the raw checkpoint does not have
            continue
        spans = sorted(span for t in manifest["tensors"] if t["file"] == name for span in _spans(weights, t))
        header, theirs = weights.files[name], headers[source]
        size = header.size
        renamed = header.tensors.keys() != theirs.tensors.keys()
        if renamed and _places(header) != _places(theirs):
            raise QKGuardError(f"{file} holds other tensors than the raw file. Restore it again.")
        with opened(raw / source) as a, opened(file) as b:
            position = header.data_start if renamed else 0
            for lo, hi in [*spans, (size, size)]:
                _same_bytes(a, b, position, lo, file)
                position = hi


def _places(header: Header) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Dtype, shape and place of every tensor, by the name that it is loaded by."""
    renamed = wrapped_names(header.tensors)
    entries = header.tensors.values()
    return {renamed.get(e.name, e.name): (e.dtype, e.shape, e.start, e.stop) for e in entries}


def _spans(weights: WeightFolder, tensor: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    entry, param = weights.entry(tensor["name"]), _param(tensor)
    itemsize = entry.float_dtype.itemsize
    for lo, hi in param.flat_ranges(0, param.full_numel):
        yield entry.start + lo * itemsize, entry.start + hi * itemsize


def _same_bytes(a: int, b: int, start: int, stop: int, file: Path) -> None:
    for position in range(start, stop, COMPARE_BYTES):
        left, right = (bytearray(min(COMPARE_BYTES, stop - position)) for _ in range(2))
        read_exactly(a, memoryview(left), position, file.name)
        read_exactly(b, memoryview(right), position, file.name)
        if left != right:
            raise QKGuardError(
                f"{file} differs from the raw file outside the restored rows, near byte {position}. Restore it again."
            )
