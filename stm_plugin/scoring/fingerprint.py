"""What function a model computes, as a hash: the part of a scores entry's key that depends on the model.

Two models get the same fingerprint only where they yield the same scores up to rounding: the bytes of every weight and
buffer, the architecture with its settings, and how it is quantized all count. An adapter counts for what it does: a
fresh LoRA, which does nothing, not at all.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from .nll import Autocast, causal_lm
from .sharding import whole

_NOT_THE_FUNCTION = {
    # Settings of a model's config that its logits do not depend on; hosts change some of them.
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "decoder_start_token_id",
    "dtype",  # the weights' own dtypes count
    "embd_pdrop",
    "eos_token_id",
    "hidden_dropout",
    "initializer_range",
    "keys_to_ignore_at_inference",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "resid_pdrop",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "torch_dtype",
    "transformers_version",
    "unsloth_version",
    "use_cache",
}

_PACKAGES_OF_LAYERS = {"torch", "transformers", "peft", "bitsandbytes"}
"""Whose layers compute what their weights, or the key's quantization and adapters, tell."""

_LORA_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def model_fingerprint(model: torch.nn.Module) -> str:
    """128-bit hash, in hexadecimal, of the function that a causal language model computes as it stands.

    Where processes share out its weights, all of them must ask.
    """
    lm = causal_lm(model)
    tensors = {name: _tensor_hash(tensor) for name, tensor in effective_tensors(model)}
    facts = {
        "class": type(lm).__name__,
        "config": _function_settings(lm.config.to_dict()),
        "attention": [lm.config._attn_implementation, lm.config.get_text_config()._attn_implementation],
        "adapters": _other_adapters(model),
        "tensors": tensors,
    }
    layers = _other_layers(lm)
    if layers:
        facts["layers"] = layers
    return hashlib.sha256(_canonical(facts)).hexdigest()[:32]


def weights_dtype(model: torch.nn.Module) -> str:
    """Dtypes of the floating-point weights that the function depends on, sorted and joined by commas."""
    weights = (tensor for _, tensor in effective_tensors(model) if isinstance(tensor, torch.nn.Parameter))
    return ",".join(sorted({str(weight.dtype) for weight in weights if weight.is_floating_point()}))


def autocast_dtype(autocast: Autocast, device: torch.device) -> str:
    """Dtype that a model's forward is autocast to on a device; `"none"` where it is not."""
    with autocast():
        return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"


def quantization(model: torch.nn.Module) -> str:
    """How the model's weights are quantized, as canonical JSON; `"none"` where they are not."""
    config = getattr(causal_lm(model).config, "quantization_config", None)
    if config is None:
        return "none"
    return _canonical(config if isinstance(config, dict) else config.to_dict()).decode()


def effective_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor that the model's function depends on, named as without adapters.

    Parameters, buffers (rotary frequencies too) and the quantization state of packed weights. Of a LoRA pair, both
    matrices or, where one of them is zero and so their product, neither; of a module saved with the adapter, the copy
    in use.
    """
    lm = causal_lm(model)
    idle, scalings = _lora_parts(lm)
    for prefix, module in lm.named_modules():
        tensors: dict[str, Any] = {}
        module._save_to_state_dict(tensors, "", True)  # names the scales of bitsandbytes' packed weights too
        tensors |= dict(module.named_buffers(recurse=False))  # those that are not saved, such as rotary frequencies
        for name, tensor in tensors.items():
            path = f"{prefix}.{name}".lstrip(".").split(".")
            is_idle = any(".".join(path[:end]) in idle for end in range(1, len(path) + 1))
            if isinstance(tensor, torch.Tensor) and not is_idle:
                yield _name_without_adapter(path), tensor
    yield from scalings.items()


def weight_dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Dtype of every parameter but the adapters', each under its name without adapters; tied ones once."""
    lm = causal_lm(model)
    adapted = [
        name for name, module in lm.named_modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    ]

    def is_an_adapter_s(name: str) -> bool:
        inner = [f"{path}.{part}." for path in adapted for part in ("base_layer", "original_module")]
        return name.startswith(tuple(f"{path}." for path in adapted)) and not name.startswith(tuple(inner))

    weights = lm.named_parameters()
    return {
        _name_without_adapter(name.split(".")): weight.dtype for name, weight in weights if not is_an_adapter_s(name)
    }


def take_over_dtypes(model: torch.nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give a model the dtypes of another one's weights, as `weight_dtypes` has them; its adapters' own stay."""
    for name, weight in causal_lm(model).named_parameters():
        dtype = dtypes.get(_name_without_adapter(name.split(".")), weight.dtype)
        if weight.is_floating_point() and dtype.is_floating_point:
            weight.data = weight.data.to(dtype)


def _lora_parts(lm: torch.nn.Module) -> tuple[set[str], dict[str, torch.Tensor]]:
    """Names of the adapter parts that leave the function as it is, and the scalings of the LoRA pairs that do not."""
    idle: set[str] = set()
    scalings: dict[str, torch.Tensor] = {}
    for prefix, module in lm.named_modules():
        if isinstance(module, LoraLayer):
            active = set() if module.disable_adapters or module.merged else set(module.active_adapters)
            for adapter, scaling in module.scaling.items():
                if adapter in active and _does_something(module, adapter):
                    scalings[f"{prefix}.scaling.{adapter}"] = torch.tensor(scaling)
                else:
                    idle |= {f"{prefix}.{part}.{adapter}" for part in _LORA_FACTORS}
                if adapter not in active:
                    idle.add(f"{prefix}.lora_magnitude_vector.{adapter}")
        elif isinstance(module, ModulesToSaveWrapper):
            active = set() if module.disable_adapters else set(module.active_adapters)
            idle |= {f"{prefix}.modules_to_save.{name}" for name in module.modules_to_save if name not in active}
            if active:
                idle.add(f"{prefix}.original_module")
    return idle, scalings


def _other_adapters(model: torch.nn.Module) -> dict[str, Any]:
    """Configs and states of the adapters whose function cannot be told from their weights: all but LoRA's."""
    configs = getattr(model, "peft_config", {})
    others = {name: config.to_dict() for name, config in configs.items() if config.peft_type != "LORA"}
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    states = {
        (type(layer).__name__, layer.disable_adapters, tuple(layer.merged_adapters), tuple(layer.active_adapters))
        for layer in layers
        if not isinstance(layer, LoraLayer)
    }
    return others | ({"states": sorted(map(str, states))} if states else {})


def _other_layers(lm: torch.nn.Module) -> dict[str, str]:
    """Layers that compute something else than their weights tell, such as with quantization that is only simulated.

    They are those of packages that neither build models nor are part of the key in another way; of torchao's fake
    quantizers, what they are set to counts too.
    """
    layers = {}
    for name, module in lm.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package in _PACKAGES_OF_LAYERS:
            continue
        has_matrix = any(weight.ndim > 1 for weight in module.parameters(recurse=False))
        own = vars(module)
        settings = [str(own[key]) for key in ("config", "enabled")] if {"config", "enabled"} <= own.keys() else []
        if has_matrix or settings:
            kind = f"{package}.{type(module).__qualname__}"
            layers[_name_without_adapter(name.split("."))] = " ".join([kind, *settings])
    return layers


def _does_something(module: Any, adapter: str) -> bool:
    """Whether a LoRA layer's update B A (or its bias) is other than zero."""
    factors = [getattr(module, part) for part in _LORA_FACTORS]
    mine = [part[adapter] for part in factors if adapter in part]
    weights = [getattr(part, "weight", part) for part in mine]
    biases = [part.bias for part in mine if getattr(part, "bias", None) is not None]
    with whole(*weights, *biases):
        return all(bool(weight.any()) for weight in weights) or any(bool(bias.any()) for bias in biases)


def _name_without_adapter(parts: list[str]) -> str:
    if "modules_to_save" in parts:
        index = parts.index("modules_to_save")
        parts[index : index + 2] = []
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _tensor_hash(tensor: torch.Tensor) -> str:
    with whole(tensor):
        digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            data = tensor.detach().contiguous().flatten().view(torch.uint8)
            for piece in data.split(2**28):  # a quarter of a GiB at a time leaves the device
                digest.update(piece.cpu().numpy())
        return digest.hexdigest()


def _function_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _function_settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_THE_FUNCTION
    }


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
