"""What a config cannot have beside STM. Loads neither torch nor Axolotl."""

from collections.abc import Mapping
from typing import Any

from ..options import REFERENCE_INITIAL

_OTHER_TRAINING = "it trains on something else than the labels of a text, which is all that STM masks"
_OTHER_LOSS = "it weights every token by a loss of its own, and the two would undo each other"
_DISTILLATION = "its loss is over a teacher's probabilities, not over labels"
_IMAGES = "token ids of images are only made batch by batch, so they cannot be scored before the first step"
_STREAMING = "a training set that is streamed cannot be scored before the first step"
_SHARDED = "it splits documents or layers over processes, so that no process can score by itself"

_CONFLICTS = {
    "rl": _OTHER_TRAINING,
    "reward_model": _OTHER_TRAINING,
    "process_reward_model": _OTHER_TRAINING,
    "orpo_alpha": _OTHER_TRAINING,
    "use_eaft": _OTHER_LOSS,
    "use_dft": _OTHER_LOSS,
    "liger_use_token_scaling": _OTHER_LOSS,
    "kd_trainer": _DISTILLATION,
    "diffusion": _OTHER_TRAINING,
    "diffusion_lm": _OTHER_TRAINING,
    "processor_type": _IMAGES,
    "use_pose": "its positions jump, so that tokens are trained in places where they are not scored",
}
_CONFLICTING_PLUGINS = {
    "kd.": _DISTILLATION,
    "diffusion.": _OTHER_TRAINING,
}
_CONFLICTS_WITH_INITIAL = {"pretraining_dataset": _STREAMING, "streaming": _STREAMING}
_MORE_THAN_ONE = {
    "context_parallel_size": _SHARDED,
    "tensor_parallel_size": _SHARDED,
    "expert_parallel_size": _SHARDED,
}


def check_conflicts(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for a config that lists the plugin beside what STM cannot work with, naming both."""
    for key, reason in _CONFLICTS.items():
        if cfg.get(key):
            raise _conflict("plugins: stm", key, cfg[key], reason)
    for name in cfg.get("plugins") or []:
        for prefix, reason in _CONFLICTING_PLUGINS.items():
            if name.replace(":", ".").removeprefix("axolotl.integrations.").startswith(prefix):
                raise _conflict("plugins: stm", "plugins", name, reason)
    for key, reason in _MORE_THAN_ONE.items():
        if isinstance(cfg.get(key), int) and cfg[key] > 1:
            raise _conflict("plugins: stm", key, cfg[key], reason)
    if (cfg.get("qat") or {}).get("fake_quant_after_n_steps"):
        reason = "the model is quantized in the middle of the run, so that it trains as another one than is scored"
        raise _conflict("plugins: stm", "fake_quant_after_n_steps", cfg["qat"]["fake_quant_after_n_steps"], reason)
    if (cfg.get("stm_reference") or REFERENCE_INITIAL) == REFERENCE_INITIAL:
        for key, reason in _CONFLICTS_WITH_INITIAL.items():
            if cfg.get(key):
                raise _conflict(f"stm_reference: {REFERENCE_INITIAL}", key, cfg[key], reason)


def _conflict(ours: str, key: str, value: Any, reason: str) -> ValueError:
    shown = value if isinstance(value, str | int | float) else "..."
    shown = str(shown).lower() if isinstance(shown, bool) else shown
    return ValueError(f"`{ours}` cannot be used with `{key}: {shown}`: {reason}. Remove one of them.")
