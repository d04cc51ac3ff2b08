"""Reads a file that `torch.save` made of one tensor, and nothing else: no code of it is run, no claim believed."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor


# What a file of one tensor holds beside it: a short pickle, version numbers and the directory of the archive.
OVERHEAD_BYTES = 2**20
# The pickle of one tensor takes about 160 bytes.
PICKLE_BYTES = 4096
# Kinds of pickle operations: global names, marks, strings, integers, tuples, empty tuples, storages, flags, calls, end.
KINDS = {
    **dict.fromkeys(("PROTO", "FRAME", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ""),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE"), "S"),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), "I"),
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), "T"),
    **dict.fromkeys(("NEWTRUE", "NEWFALSE"), "F"),
    **{"GLOBAL": "G", "MARK": "M", "EMPTY_TUPLE": "E", "BINPERSID": "P", "REDUCE": "R", "STOP": "."},
}
# _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, OrderedDict()). Anything else may run code, or never
# end: a short pickle can hold a key of 2^60 parts to hash.
ONE_TENSOR = re.compile(r"GMMSGSSITPI(M?I+T|E){2}FGERTR\.")
GLOBALS = (
    {"torch._utils _rebuild_tensor_v2"},
    {f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16")},
    {"collections OrderedDict"},
)


def read_tensor(path: Path, shape: tuple[int, int, int], base_model: str) -> Tensor:
    """The tensor of a file, (layers, d, d), memory-mapped.

    Args:
        shape: that it must have.
        base_model: whose shape that is, for messages.

    Raises:
        ValueError: the file is larger than such a tensor, damaged, or holds anything else.
    """
    count = shape[0] * shape[1] * shape[2]
    expected = f"{base_model} has {shape[0]} layers of hidden size {shape[1]}, so {shape} is needed"
    _check_archive(path, 8 * count + OVERHEAD_BYTES, expected)
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ValueError(f"{path} cannot be read as a tensor: {' '.join(str(error).split())[:200]}") from error
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{path} holds a tensor of shape {tuple(tensor.shape)}; {expected}")
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != count * tensor.element_size():
        raise ValueError(f"{path} claims another size than it has: it is damaged")
    return tensor


def _check_archive(path: Path, limit: int, expected: str) -> None:
    """Raise ValueError unless a file is what `torch.save` makes of one tensor, of at most `limit` bytes. Nothing is
    unpickled or unpacked."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size} bytes, at most {limit} are possible: {expected}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries)
            if packed or sum(e.file_size for e in entries) > size:
                raise ValueError(f"{path} unpacks to more than it holds: it is no file of the published code")
            pickles = [e for e in entries if e.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES:
                raise ValueError(f"{path} must hold one tensor and nothing else, as torch.save writes it")
            pickle = archive.read(pickles[0])
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:  # RuntimeError: encrypted, or another way to pack
        raise ValueError(f"{path} is damaged, or not written by torch.save: {error}") from error
    try:
        operations = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(pickle)]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    names = [argument for name, argument in operations if name == "GLOBAL"]
    foreign = next((n for n, allowed in zip(names, GLOBALS, strict=False) if n not in allowed), None)
    if foreign or not ONE_TENSOR.fullmatch("".join(KINDS.get(name, "?") for name, _ in operations)):
        what = f" ({foreign:.80})" if foreign else ""
        raise ValueError(f"{path} holds something else than one tensor{what}: refused, nothing in it was executed")
