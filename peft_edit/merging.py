"""A checkpoint on disk + an adapter that merges -> a merged checkpoint on disk, without loading the model.

Files are copied in pieces. Only tensors that are edited are in memory: one that is written and one that is merged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import CHAT_TEMPLATE_DIR

from .adapters.read import load_adapter, load_adapter_config
from .arguments import Argument, ArgumentError
from .files import check_free, growing_folder, publish, resolved, sync
from .models.checkpoint import Checkpoint, Source, StoredTensor, axis_in_source, find_sources
from .models.devices import known_device
from .models.dtypes import FLOATING
from .models.load import BaseModel, load_structure
from .tuners.layer import EditLayer, edit_layers
from .tuners.method import method_of, names
from .version import __version__


Result = TypeVar("Result")

COPY_BYTES = 2**23
# The name that PEFT gives an adapter which is loaded without one.
ADAPTER = "default"
# Weights in other forms, which do not have the edit, and pickles.
OTHER_WEIGHTS = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.h5.index.json", "*.msgpack"),
    *("*.msgpack.index.json", "*.gguf", "*.onnx", "*.onnx_data", "*.ot", "*.npz", "*.tflite", "*.mlmodel"),
)


@dataclass(frozen=True)
class CheckpointMerge:
    """Result of `merge_checkpoint`.

    Attributes:
        path: folder of the merged checkpoint.
        files: number of its files with tensors.
        resumed: how many of them an earlier run had finished.
        tensors: number of its tensors.
        edited: keys of those that were edited.
        bytes: size of its files with tensors.
        relative_error: mean over the sites, as the adapter's fit measured it; 0 for an edit that merges exactly.
    """

    path: Path
    files: int
    resumed: int
    tensors: int
    edited: tuple[str, ...]
    bytes: int
    relative_error: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "edited": list(self.edited)}


@dataclass(frozen=True)
class Edit:
    """Bytes of a file that hold a weight or a bias, or that of one expert, and the layer whose edit merges into it.
    `beside` are the parameters that `merge_reads` of the layer names."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    axis: int
    layer: EditLayer
    beside: dict[str, StoredTensor] = field(default_factory=dict)


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_fingerprint_mismatch: bool = False,
) -> CheckpointMerge:
    """Merge an adapter into a safetensors checkpoint, file by file.

    The result has the same files, index, configuration and tokenizer; tensors that are not edited are the same bytes;
    the others keep their dtype and equal those of `merge_and_unload` on the same device with as many threads. Memory
    holds two edited tensors at a time. A run that was killed goes on where it was when it is started again. An edit
    that merges inexactly is merged with a warning that carries the error which its fit measured.

    Args:
        base: folder of the base model's checkpoint, or its id on the Hub, from where it is downloaded.
        adapter: folder of the adapter, or its id on the Hub.
        out: folder of the merged checkpoint. It appears once it is complete.
        device: where products are computed: "cpu", "cuda", "cuda:1", ...; "auto" for a GPU where there is one.
        revision: of the base model on the Hub.
        trust_remote_code: run the base model's own code, where it has some.
        allow_fingerprint_mismatch: accept an adapter of a model with other weights.

    Raises:
        ValueError: the base is no complete safetensors checkpoint or is quantised, the adapter is of another method or
            another model or does not merge, the output folder is in use, or the disk is too small. Nothing is written.
    """
    out, target = resolved(Path(out)), _device(device)
    _check_adapter(str(adapter))
    folder = _local(str(base), revision)
    if resolved(folder) in (out, *out.parents):
        raise ValueError(f"{out} is the base model's folder or lies in it: choose another folder")
    check_free(out)
    checkpoint = Checkpoint(folder)
    model = load_structure(BaseModel(str(folder), trust_remote_code=trust_remote_code))
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{base} is quantised: merge into the checkpoint that it was made from, and quantise that")
    # Before the adapter is there, which changes names.
    sources = find_sources(model, checkpoint.tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_shapes(checkpoint, sources, shapes)
    adapted = load_adapter(model, str(adapter), allow_fingerprint_mismatch, edit_only="merged")
    layers = _layers_to_merge(adapted, str(adapter), target)
    edited, identity = _plan(checkpoint, sources, shapes, layers), _identity(checkpoint, adapted, target)
    with growing_folder(out, identity) as work:
        todo = [file for file in checkpoint.files if not (work / file).exists()]
        others = _other_files(checkpoint)
        _check_space(checkpoint, todo, others, work)
        _write_files(checkpoint, todo, edited, work, target)
        for name in others:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, work / name)
            sync(work / name)
    errors = [error for layer in layers if (error := layer.merge_error(ADAPTER)) is not None]
    return CheckpointMerge(
        path=out,
        files=len(checkpoint.files),
        resumed=len(checkpoint.files) - len(todo),
        tensors=len(checkpoint.tensors),
        edited=tuple(sorted(edited)),
        bytes=sum((folder / file).stat().st_size for file in checkpoint.files),
        relative_error=sum(errors) / len(errors) if errors else 0.0,
    )


def _check_adapter(adapter: str) -> None:
    """Raise ValueError, with the reason, for an adapter of a method that does not merge, or with other modules."""
    config = load_adapter_config(adapter)
    if (method := method_of(config)) is None or method.no_merge:
        merging = names(lambda method: not method.no_merge)
        reason = f"; {method.no_merge}" if method else ""
        raise ValueError(
            f"{adapter} is an adapter of another method ({config.peft_type.value}): only {merging} merges into the "
            f"weights{reason}"
        )
    if config.modules_to_save:
        raise ValueError(
            f"{adapter} also holds trained modules ({', '.join(config.modules_to_save)}): "
            "load it with its base model and call merge_and_unload"
        )


def gguf_refusal(folder: str, file: str) -> str:
    """Why a GGUF file is no checkpoint to merge into, and the way round."""
    return (
        f"{file} of {folder} is a GGUF file, and merging is into safetensors: save the model as safetensors once, "
        "as examples/moving_on.md shows, and merge into that folder"
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = known_device("device", name)
    try:
        if device.type != "cuda":
            torch.zeros(1, device=device).cpu()  # of this build of PyTorch, and with data, which meta has not
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(Argument("device"), f" must be auto, cpu, cuda, cuda:1, ..., got {name!r}") from error
    return device


def _local(base: str, revision: str | None) -> Path:
    """The folder of the base model, downloaded from the Hub where it is none."""
    if (files := sorted(Path(base).glob("*.gguf"))) and not (Path(base) / "config.json").exists():
        raise ValueError(gguf_refusal(base, files[0].name))
    BaseModel(base).check_local()
    if Path(base).is_dir():
        return Path(base)
    return Path(snapshot_download(base, revision=revision, ignore_patterns=list(OTHER_WEIGHTS)))


def _layers_to_merge(adapted: PeftModel, adapter: str, device: torch.device) -> list[EditLayer]:
    """The layers where an adapter edits, with its modules on a device."""
    adapted.base_model.prepare_merge(None, stacklevel=4)
    layers = [layer for layer in edit_layers(adapted) if layer.is_fitted(ADAPTER)]
    if not layers:
        learnt_by = method_of(adapted.active_peft_config).learnt_by
        raise ValueError(f"{adapter} edits nothing: fit it first ({learnt_by})")
    for layer in layers:
        for part in layer.adapter_layer_names:
            getattr(layer, part)[ADAPTER].to(device)
    return layers


def _check_shapes(checkpoint: Checkpoint, sources: dict[str, list[Source]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a tensor that Transformers loads as it is, edited or not, and that the model has in another
    shape."""
    for name, shape in shapes.items():
        for source in sources.get(name, []):
            if not source.operations and checkpoint.tensors[source.key].shape != shape:
                raise _other_shape(checkpoint, source.key, name, shape)


def _other_shape(checkpoint: Checkpoint, key: str, name: str, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{key} of {checkpoint.path} has shape {checkpoint.tensors[key].shape}, {name} of the model {shape}: it is of "
        "another model than its config.json, or in a form that cannot be merged into"
    )


def _plan(
    checkpoint: Checkpoint,
    sources: dict[str, list[Source]],
    shapes: dict[str, tuple[int, ...]],
    layers: list[EditLayer],
) -> dict[str, list[Edit]]:
    """Key of each tensor that is edited to the parts of its file that are merged by themselves."""
    edited: dict[str, list[Edit]] = {}
    for layer in layers:
        edited |= _edits(checkpoint, sources, shapes, layer)
    return edited


def _edits(
    checkpoint: Checkpoint, sources: dict[str, list[Source]], shapes: dict[str, tuple[int, ...]], layer: EditLayer
) -> dict[str, list[Edit]]:
    """The part of the plan that one layer makes."""
    edits: dict[str, list[Edit]] = {}
    beside = {read: _as_it_is(checkpoint, sources, shapes, f"{layer.site}.{read}") for read in layer.merge_reads}
    for relative, output in layer.output_tensors().items():
        name = f"{layer.site}.{relative}"
        found, shape = sources.get(name, []), shapes[name]
        of_experts = bool(found and found[0].stacks)
        if len(found) != (shape[0] if of_experts else 1):
            raise ValueError(
                f"{checkpoint.path} has {len(found)} tensors for {name}, {shape[0] if of_experts else 1} expected: it "
                "is of another model than its config.json, incomplete, or in a form that cannot be merged into"
            )
        for source in found:
            stored = checkpoint.tensors[source.key]
            _check_floating(checkpoint, source.key)
            axis = axis_in_source(source, stored.shape, shape, output.axis)
            if axis is None:
                raise _other_shape(checkpoint, source.key, name, shape)
            whole = Edit(stored.start, stored.end, FLOATING[stored.dtype], stored.shape, axis, layer, beside)
            edits[source.key] = _split(whole) if output.stacked and not of_experts else [whole]
    return edits


def _check_floating(checkpoint: Checkpoint, key: str) -> None:
    if (dtype := checkpoint.tensors[key].dtype) not in FLOATING:
        raise ValueError(
            f"{key} of {checkpoint.path} is quantised ({dtype}): merge into the checkpoint that it was made from"
        )


def _as_it_is(
    checkpoint: Checkpoint, sources: dict[str, list[Source]], shapes: dict[str, tuple[int, ...]], name: str
) -> StoredTensor:
    """The tensor of the checkpoint that is a parameter of the model, without any operation."""
    found = sources.get(name, [])
    if len(found) != 1 or found[0].operations:
        raise ValueError(
            f"{checkpoint.path} has {name} in a form that cannot be read for merging: save the model once with "
            "save_pretrained, and merge into that"
        )
    _check_floating(checkpoint, found[0].key)
    stored = checkpoint.tensors[found[0].key]
    if stored.shape != shapes[name]:
        raise _other_shape(checkpoint, found[0].key, name, shapes[name])
    return stored


def _split(edit: Edit) -> list[Edit]:
    """An edit for each expert of a tensor that stacks them."""
    count, *shape = edit.shape
    size = (edit.end - edit.start) // count
    starts = range(edit.start, edit.end, size)
    return [replace(edit, start=at, end=at + size, shape=tuple(shape), axis=edit.axis - 1) for at in starts]


def _identity(checkpoint: Checkpoint, adapted: PeftModel, device: torch.device) -> dict[str, Any]:
    """All that the bytes of the result follow from. A file that was changed in between has another time or size."""
    digest = hashlib.sha256(json.dumps(adapted.active_peft_config.to_dict(), sort_keys=True, default=sorted).encode())
    # By default PEFT adds the embeddings, which are on meta here, where they were resized.
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    stats = {file: (checkpoint.path / file).stat() for file in checkpoint.files}
    return {
        "peft_edit": __version__,
        "adapter": digest.hexdigest(),
        "device": device.type,
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
    }


def _other_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the index, configuration, tokenizer and other files, without the weights in other forms."""
    templates = checkpoint.path / CHAT_TEMPLATE_DIR
    files = (*checkpoint.path.iterdir(), *(templates.iterdir() if templates.is_dir() else ()))
    names = (
        str(file.relative_to(checkpoint.path)) for file in files if file.is_file() and not file.name.startswith(".")
    )
    weights = (*OTHER_WEIGHTS, "*.safetensors", "*.safetensors.index.json")
    others = {name for name in names if not any(fnmatch(name, w) for w in weights)}
    return sorted(others | ({checkpoint.index} if checkpoint.index else set()))


def _check_space(checkpoint: Checkpoint, todo: list[str], others: list[str], work: Path) -> None:
    needed = sum((checkpoint.path / name).stat().st_size for name in (*todo, *others))
    reused = sum(file.stat().st_size for file in work.rglob("*.part"))
    free = shutil.disk_usage(work).free + reused
    if needed > free:
        raise ValueError(
            f"the merged checkpoint needs {needed / 1e6:,.1f} MB more and {work.parent} has {free / 1e6:,.1f} MB left: "
            "make room or choose another disk"
        )


def _write_files(
    checkpoint: Checkpoint, todo: list[str], edited: dict[str, list[Edit]], work: Path, device: torch.device
) -> None:
    """Write the files with tensors. Beside this thread, which copies, one merges the next tensor, and one waits until
    the last file is on the disk."""
    by_file: dict[str, list[Edit]] = {file: [] for file in todo}
    for key, edits in edited.items():
        if (file := checkpoint.tensors[key].file) in by_file:
            by_file[file] += edits
    for edits in by_file.values():
        edits.sort(key=lambda edit: edit.start)
    sizes = {file: (checkpoint.path / file).stat().st_size for file in todo}
    buffer = memoryview(bytearray(COPY_BYTES))
    with (
        tqdm(total=sum(sizes.values()), desc="merging", unit="B", unit_scale=True, leave=None) as progress,
        # A new thread does not take over this one's number of threads for products, on which their rounding depends.
        ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool,
    ):
        calls = (partial(_merged, checkpoint.path, file, edit, device) for file in todo for edit in by_file[file])
        merged = _one_ahead(pool, calls)
        finishing: Future | None = None
        for file, size in sizes.items():
            part = work / f"{file}.part"
            part.parent.mkdir(parents=True, exist_ok=True)
            with (checkpoint.path / file).open("rb") as source, part.open("wb") as sink:
                for edit in by_file[file]:
                    _copy(source, sink, edit.start - source.tell(), progress, buffer)
                    sink.write(next(merged))
                    source.seek(edit.end)
                    progress.update(edit.end - edit.start)
                _copy(source, sink, size - source.tell(), progress, buffer)
            if finishing:
                finishing.result()
            finishing = pool.submit(publish, part, work / file)
        if finishing:
            finishing.result()


def _one_ahead(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Results of calls in their order. While one is in use, the next is made."""
    pending: deque[Future] = deque()
    for call in calls:
        pending.append(pool.submit(call))
        if len(pending) == 2:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()


def _copy(source: BinaryIO, sink: BinaryIO, count: int, progress: tqdm, buffer: memoryview) -> None:
    """Copy the next `count` bytes through a buffer."""
    while count > 0:
        piece = buffer[: min(count, len(buffer))]
        _read(source, piece)
        sink.write(piece)
        progress.update(len(piece))
        count -= len(piece)


def _merged(folder: Path, file: str, edit: Edit, device: torch.device) -> memoryview:
    """The bytes of an edit, merged. They are in memory once."""
    tensor = _tensor(folder / file, edit.start, edit.end, edit.dtype, edit.shape).to(device)
    beside = {
        name: _tensor(folder / stored.file, stored.start, stored.end, FLOATING[stored.dtype], stored.shape).to(device)
        for name, stored in edit.beside.items()
    }
    edit.layer.merge_into(tensor, edit.axis, ADAPTER, out=tensor, **beside)
    return tensor.cpu().view(torch.uint8).numpy().data


def _tensor(path: Path, start: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A part of a file."""
    data = torch.empty(end - start, dtype=torch.uint8)
    with path.open("rb", buffering=0) as source:
        source.seek(start)
        _read(source, data.numpy().data)
    return data.view(dtype).view(shape)


def _read(source: BinaryIO, piece: memoryview) -> None:
    """Fill `piece` from a file."""
    while len(piece):
        if not (size := source.readinto(piece)):
            raise ValueError(f"{source.name} became shorter while it was read: merge again")
        piece = piece[size:]
