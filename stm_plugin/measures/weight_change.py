"""How far training moved a model's weights: the L2 norm of the change, over all weights together."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor
    from torch.nn import Module

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""LoRA initializations that move part of the base weights into the adapter before training starts."""


def adapter_change_norm(model: "PeftModel") -> float:
    """L2 norm of what a LoRA or DoRA adapter adds to its base model's weights.

    Equal, but for rounding, to `change_norm(base, model.merge_and_unload())`; layer by layer and without a merged
    copy of the model. LoRA adds `scaling * B @ A`, DoRA rescales the rows of the sum as well. Modules trained in full
    (`modules_to_save`) count with their difference. Where both ends of a tied model have LoRA, each has its own change
    here, as in the model that runs; merging adds both to the one weight.

    Args:
        model: A PEFT model with one active LoRA adapter, not merged. The base may be quantized.

    Returns:
        The norm, in units of the weights.

    Raises:
        ValueError: The adapter is of another kind, is merged, or its change cannot be told from its weights.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    _check_adapter(model)
    adapter = model.active_adapter
    total = 0.0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            total += _squared_sum(_layer_change(module, adapter))
        elif isinstance(module, ModulesToSaveWrapper):
            total += change_norm(module.original_module, module.modules_to_save[adapter]) ** 2
    return math.sqrt(total)


def change_norm(initial: "Module", tuned: "Module") -> float:
    """L2 norm of the difference between two models' parameters; shared (tied) ones count once.

    Naively `torch.cat([(t - i).flatten() for i, t in zip(initial.parameters(), tuned.parameters())]).norm()`.

    Args:
        initial: The model before training.
        tuned: The model after training, with the same parameters.

    Returns:
        The norm, in units of the weights. Differences are taken in float32, their squares summed in float64;
        quantized weights (bitsandbytes) count as what they stand for.

    Raises:
        ValueError: The models' parameters differ in names or shapes.
    """
    before, after = dict(initial.named_parameters()), dict(tuned.named_parameters())
    _check_same_names(before, after)
    return math.sqrt(sum(_squared_difference(name, _weight(initial, name), _weight(tuned, name)) for name in before))


def checkpoint_change_norm(initial: str, tuned: str) -> float:
    """`change_norm` of two saved models, one tensor at a time: neither model is ever in memory.

    Where the weights are no safetensors files, or the files name their tensors in different ways, both models are
    loaded after all.

    Args:
        initial: Folder or hub id of the model before training.
        tuned: That of the model after training, saved as a whole.

    Returns:
        The norm, in units of the weights.

    Raises:
        ValueError: One of the models is saved in quantized form, or their weights differ in names or shapes.
    """
    from safetensors import safe_open

    before, after = _tensor_files(initial), _tensor_files(tuned)
    if before is None or after is None or before.keys() != after.keys():
        from transformers import AutoModelForCausalLM

        models = (AutoModelForCausalLM.from_pretrained(name, dtype="auto") for name in (initial, tuned))
        return change_norm(*models)

    def tensors(files: dict[str, str], names: list[str]) -> "Iterator[Tensor]":
        file, opened = None, None
        for name in names:
            if files[name] != file:
                file, opened = files[name], safe_open(files[name], "pt")
            assert opened is not None
            yield opened.get_tensor(name)

    names = sorted(before, key=lambda name: (before[name], name))
    total = 0.0
    for name, one, other in zip(names, tensors(before, names), tensors(after, names), strict=True):
        total += _squared_difference(name, one, other)
    return math.sqrt(total)


def _tensor_files(name: str) -> dict[str, str] | None:
    """The safetensors file of each weight of a saved model; None where it cannot be read that way.

    Raises:
        ValueError: The model is saved in quantized form.
    """
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    from .inputs import not_found

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise not_found(name, error) from None
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name} is saved in quantized form, so that its files do not say what its weights were. Give the model "
            "before it was quantized, or the adapter."
        )
    missing_is_none: Any = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, "model.safetensors.index.json", **missing_is_none)
    if index is not None:
        shards = get_checkpoint_shard_files(name, index)[0]
    else:
        whole = cached_file(name, "model.safetensors", **missing_is_none)
        if whole is None:
            return None
        shards = [whole]
    files: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), shard)
    has_head_twice = config.get_text_config().tie_word_embeddings and any("lm_head." in name for name in files)
    return None if has_head_twice else files


def _check_same_names(before: dict[str, Any], after: dict[str, Any]) -> None:
    if before.keys() != after.keys():
        name = sorted(before.keys() ^ after.keys())[0]
        raise ValueError(f"the models differ in their parameters: only one of them has {name}.")


def _squared_difference(name: str, before: "Tensor", after: "Tensor") -> float:
    """Squared norm of the change of one weight."""
    if before.shape != after.shape:
        raise ValueError(f"{name} has shape {tuple(before.shape)} in one model and {tuple(after.shape)} in the other.")
    return _squared_sum(after.float() - before.float().to(after.device))


def _weight(model: "Module", name: str) -> "Tensor":
    """A parameter; what it stands for, where it is quantized."""
    from peft.utils.integrations import dequantize_module_weight

    weight = model.get_parameter(name)
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return dequantize_module_weight(model.get_submodule(name.rpartition(".")[0])).detach()
    return weight.detach()


def _check_adapter(model: "PeftModel") -> None:
    """Raises ValueError unless `model` carries one LoRA adapter whose change is a function of its own weights."""
    from peft.utils.other import TrainableTokensWrapper

    if len(model.active_adapters) != 1:
        raise ValueError(f"the weight change is of one active adapter; this model has {model.active_adapters}.")
    config = model.active_peft_config
    if str(config.peft_type.value) != "LORA":
        raise ValueError(f"the weight change is known for LoRA and DoRA adapters, not for {config.peft_type.value}.")
    if config.bias != "none" or config.lora_bias:
        raise ValueError("this adapter trained biases of the base model, whose initial values it does not keep.")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} moves base weights into the adapter before training, so "
            "the adapter is not the change. Merge both models and use change_norm."
        )
    if getattr(config, "ensure_weight_tying", False):
        raise ValueError(
            "the weight change of tied layers that are trained as one (ensure_weight_tying) is not supported. Merge "
            "the adapter into its base (`merge_and_unload`), save the model, and compare it as a whole one."
        )
    if any(isinstance(module, TrainableTokensWrapper) for module in model.modules()):
        raise ValueError("the weight change of single trained tokens (trainable_token_indices) is not supported.")


def _layer_change(layer: "LoraLayer", adapter: str) -> "Tensor":
    """What the adapter adds to one layer's weight, in the weight's shape."""
    import torch
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils.integrations import dequantize_module_weight

    if layer.merged:
        raise ValueError("the adapter is merged into its base; unmerge it first.")
    change: Tensor = layer.get_delta_weight(adapter).detach()
    if adapter not in layer.lora_variant:
        return change
    if not isinstance(layer.lora_variant[adapter], DoraLinearVariant):
        variant = type(layer.lora_variant[adapter]).__name__
        raise ValueError(f"the weight change of {variant} on a {type(layer).__name__} layer is not supported.")
    weight = dequantize_module_weight(layer.get_base_layer()).detach().to(change.device, torch.float32)
    moved = weight + change.float()
    # One magnitude for each output; transformers' Conv1D keeps the outputs in the second dimension.
    input_dim = 0 if layer.fan_in_fan_out else 1
    magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float().unsqueeze(input_dim)
    return magnitude * moved / torch.linalg.norm(moved, dim=input_dim, keepdim=True) - weight


def _squared_sum(tensor: "Tensor") -> float:
    """Sum of squares, in float64."""
    import torch

    return tensor.float().pow(2).sum(dtype=torch.float64).item()
