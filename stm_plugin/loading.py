"""Models by their paths or hub ids, and adapters on their bases, as peft loads them.

transformers can load an adapter too, but drops what DoRA has beside A and B; and peft only warns where a file lacks
weights of the adapter, which then does nothing. Either way there is a model that looks healthy and is another one.
"""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Where a model or a tokenizer is.

    Attributes:
        name: Folder or hub id.
        revision: On the hub; None for the newest.
    """

    name: str
    revision: str | None = None


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Whether a folder or hub id is that of an adapter.

    Raises:
        OSError, ValueError: If it is neither a folder nor a hub id that can be reached.
    """
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(name, revision=revision) is not None


def base_of(adapter: str, revision: str | None = None) -> Source:
    """The model that an adapter's config names as the one that it is for.

    Raises:
        ValueError: If it names none.
    """
    from transformers.utils import find_adapter_config_file

    return base_in(Path(find_adapter_config_file(adapter, revision=revision)))


def base_in(adapter_config: Path) -> Source:
    """The model that an adapter_config.json names; ValueError if it names none."""
    config = json.loads(adapter_config.read_text(encoding="utf-8"))
    if not config.get("base_model_name_or_path"):
        raise ValueError(f"{adapter_config} does not say which model it is for (base_model_name_or_path).")
    return Source(str(config["base_model_name_or_path"]), config.get("revision"))


def device_of(name: str | None) -> str:
    """The device of a name, or by default the first GPU, or else the CPU; ValueError for one that is not here."""
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no device {device!r} here ({reason}). Name one as torch does: cpu, cuda, cuda:1.") from None
    return device


def tokenizer_source(name: str, revision: str | None = None, base: Source | None = None) -> Source:
    """Where a model's tokenizer is: an adapter's beside it if it was saved there, or else with its base.

    Args:
        name: Folder or hub id of a model or adapter.
        revision: Its revision.
        base: Model that an adapter is put on; None for the one that its config names.
    """
    from transformers.utils.hub import has_file

    if not is_adapter(name, revision) or has_file(name, "tokenizer_config.json", revision=revision):
        return Source(name, revision)
    return base or base_of(name, revision)


def load_causal_lm(
    name: str, keywords: dict[str, Any], *, base: Source | None = None, num_tokens: int | None = None
) -> Any:
    """Load a causal language model, or an adapter on its base.

    Args:
        name: Folder or hub id of the model or adapter.
        keywords: Keyword arguments for `from_pretrained`; `revision` is that of the adapter, if it is one.
        base: Model that an adapter is put on; None for the one that its config names.
        num_tokens: Tokens of the tokenizer: a base of fewer gets embeddings for those that training added.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it cannot be loaded, or for an adapter as `with_adapter` does.
    """
    from transformers import AutoModelForCausalLM

    revision = keywords.get("revision")
    if not is_adapter(name, revision):
        if base is not None:
            raise ValueError(f"{name} is no adapter that could be put on {base.name}: it has no adapter_config.json.")
        return AutoModelForCausalLM.from_pretrained(name, **keywords)
    base = base or base_of(name, revision)
    model = AutoModelForCausalLM.from_pretrained(base.name, **keywords | {"revision": base.revision})
    if num_tokens is not None and num_tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(num_tokens)
    return with_adapter(model, name, revision=revision)


def with_adapter(model: Any, adapter: str, *, revision: str | None = None, is_trainable: bool = False) -> Any:
    """A model with a saved adapter put on it, as peft's `PeftModel`.

    Args:
        model: The base.
        adapter: Folder or hub id of the adapter.
        revision: The adapter's.
        is_trainable: Whether it is to be trained further.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If it does not fit the base: other shapes, or weights that only one of the two has. Or if the base
            carries an adapter, as one does that was loaded from an adapter's folder.
    """
    from peft import PeftModel

    if getattr(model, "_hf_peft_config_loaded", False) or isinstance(model, PeftModel):
        raise ValueError(
            f"{adapter} is an adapter on a model that is one with an adapter itself. Merge that one into its base "
            "(`merge_and_unload`), save the result, and name it as the base of this one."
        )
    misfit = f"{adapter} is an adapter that does not fit its base {model.config.name_or_path!r}: "
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r"[\s\S]*Found missing adapter keys")
            tuned = PeftModel.from_pretrained(model, adapter, revision=revision, is_trainable=is_trainable)
    except UserWarning as error:
        raise ValueError(f"{misfit}{_short(str(error))} Without them it would do nothing there.") from None
    except RuntimeError as error:  # one of its weights has another shape, say
        raise ValueError(f"{misfit}{_short(str(error))}") from error
    # peft says what it could not place only where an adapter is loaded that is there already.
    unplaced = tuned.load_adapter(adapter, "default", revision=revision, is_trainable=is_trainable).unexpected_keys
    if unplaced and not tuned.active_peft_config.is_prompt_learning:  # virtual tokens go where peft does not look
        raise ValueError(f"{misfit}the model has no place for its weights {_short(str(unplaced))}.")
    return tuned


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]} ..."
