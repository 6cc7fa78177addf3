"""How far training moved a model's weights: the L2 norm of the change, over all weights together."""

import math
from typing import TYPE_CHECKING

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
    (`modules_to_save`) count with their difference.

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
        The norm, in units of the weights. Differences are taken in float32, their squares summed in float64.

    Raises:
        ValueError: The models' parameters differ in names or shapes.
    """
    before, after = dict(initial.named_parameters()), dict(tuned.named_parameters())
    if before.keys() != after.keys():
        name = sorted(before.keys() ^ after.keys())[0]
        raise ValueError(f"the models differ in their parameters: only one of them has {name}.")
    total = 0.0
    for name, weight in before.items():
        if weight.shape != after[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} in one model and {tuple(after[name].shape)} in the other."
            )
        total += _squared_sum(after[name].detach().float() - weight.detach().float().to(after[name].device))
    return math.sqrt(total)


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
