"""The only reader of what an `EditTrainer` saves while it trains."""

from __future__ import annotations

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..adapters.read import read_config, read_weights
from ..arguments import Argument, ArgumentError
from ..models.sites import layer_index
from ..tuners.config import EditConfig
from ..tuners.layer import EditLayer


def load_checkpoint(
    trainer: str,
    path: Path,
    adapter_name: str,
    config: EditConfig,
    layers: dict[int, EditLayer],
    fingerprint: str | None = None,
) -> None:
    """Load an adapter's weights from a checkpoint of an `EditTrainer`.

    Args:
        trainer: name of its class.
        path: folder of the checkpoint.
        adapter_name, config, layers: of the adapter.
        fingerprint: of the model whose activations it must have been trained on; None for any.

    Raises:
        ValueError: it is none, or of an adapter with other layers or networks, or of another model.
    """
    # PEFT saves an adapter that is not named "default" in a folder of its own.
    folder = path / adapter_name if (path / adapter_name / SAFETENSORS_WEIGHTS_NAME).exists() else path
    if not (folder / SAFETENSORS_WEIGHTS_NAME).exists():
        raise ValueError(f"{path} is no checkpoint of {trainer}: it has no {SAFETENSORS_WEIGHTS_NAME}")
    saved = read_config(folder)
    of_checkpoint = getattr(saved, "base_model_fingerprint", None)
    if None not in (fingerprint, of_checkpoint) and of_checkpoint != fingerprint:
        raise ArgumentError(
            f"{path} was trained on activations of another model (fingerprint {of_checkpoint}, the store has "
            f"{fingerprint}): start in another ",
            *(Argument("output_dir"), ", or pass ", Argument("allow_fingerprint_mismatch", True)),
        )
    tensors = read_weights(str(folder), str(path))
    first = next(iter(layers.values()))
    child = config.method.lower()
    own = tuple(f".{child}.{part}." for part in first.adapter_layer_names)
    tensors = {key: tensor for key, tensor in tensors.items() if any(part in key for part in own)}
    of_checkpoint = {"layers": sorted({layer_index(key) for key in tensors})}
    of_adapter = {"layers": list(layers)}
    for name in config.fixed[len(EditConfig.fixed) :]:  # which decide what tensors an adapter has
        of_checkpoint[name], of_adapter[name] = getattr(saved, name, None), getattr(config, name)
    for name, expected in of_adapter.items():
        if of_checkpoint[name] != expected:
            raise ArgumentError(
                f"{path} is a checkpoint of another configuration (",
                *(Argument(name), f" is {of_checkpoint[name]} there, {expected} here): "),
                "resume with the configuration that it was made with, or start in another ",
                Argument("output_dir"),
            )
    for layer in layers.values():
        for part in layer.adapter_layer_names:
            start = f".{layer.site}.{child}.{part}."
            state = {key.partition(start)[2]: tensor for key, tensor in tensors.items() if start in key}
            getattr(layer, part)[adapter_name].load_state_dict(state)
