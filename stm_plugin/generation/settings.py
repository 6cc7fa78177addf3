"""What a generation is asked for."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .access import check_url
from .data import GROUND_TRUTH
from .engines import Sampling

SELF_OUTPUT, REPHRASE = METHODS = ("self-output", "rephrase")
REJECTED = (GROUND_TRUTH, "drop")
_ADAPTER_FILES = (
    *("adapter_*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab*", "merges.txt", "*.model"),
)
"""What of an adapter's folder has a part in the answers."""
_SAMPLES = {SELF_OUTPUT: 32, REPHRASE: 1}


@dataclass(frozen=True)
class Endpoint:
    """A server that speaks OpenAI's chat completions.

    Attributes:
        url: Such as `http://localhost:8000/v1`.
        model: The server's name for the model; None for the name of the model that scores.
        concurrency: Most requests at a time.
        timeout: Seconds that a request may take.
        max_retries: How often a request is tried again.
        api_key_env: Environment variable that holds the key, if the server wants one; None for `OPENAI_API_KEY`,
            which is sent to hosts of openai.com only.
    """

    url: str
    model: str | None = None
    concurrency: int = 16
    timeout: float = 600.0
    max_retries: int = 5
    api_key_env: str | None = None


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of `generate_data`; the command's flags have the same names.

    Attributes:
        method: One of `METHODS`.
        model: Model or adapter whose answers these are: it scores, and generates where there is no endpoint.
        data: Data set with human answers, as `data.read_data` takes it.
        output: File to write, .jsonl; the samples and the receipt lie beside it.
        adapter: Adapter put on the model.
        samples: Samples of each row; None for the method's own number, 32 or 1.
        sampling: How they are drawn.
        batch_size: Answers generated at once, in process.
        dtype: As for `inputs.load_model`.
        load_in_4bit: As for `inputs.load_model`.
        device: As for `inputs.load_model`.
        verifier: Name or dotted path; None for the one that the data's form suits.
        run_model_code: Whether a verifier may run code that the model wrote, contained.
        template: File with the template of `rephrase`; None for the default.
        chat_template_kwargs: What the chat template of every row is given beside its messages, such as
            `{"enable_thinking": False}`; it stands in the output's rows too.
        rejected: What becomes of a row of which no sample passes, one of `REJECTED`.
        rows: Most rows to take, from the first; None for all.
        endpoint: Server that generates; None to generate in process.
        again: Whether to start anew where there are samples already.

    Raises:
        ValueError: For a value that is not allowed.
    """

    method: str
    model: str
    data: str
    output: Path
    adapter: str | None = None
    samples: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 32
    dtype: str = "auto"
    load_in_4bit: bool = False
    device: str | None = None
    verifier: str | None = None
    run_model_code: bool = False
    template: Path | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    rejected: str = GROUND_TRUTH
    rows: int | None = None
    endpoint: Endpoint | None = None
    again: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.rejected not in REJECTED:
            raise ValueError(f"--rejected must be one of {', '.join(REJECTED)}, got {self.rejected!r}.")
        if self.template is not None and self.method != REPHRASE:
            raise ValueError(f"--template is for --method {REPHRASE}; {self.method} asks the problem as it is.")
        if self.output.suffix.lower() != ".jsonl":
            raise ValueError(
                f"--output must end in .jsonl, by which TRL and Axolotl know the form; got {self.output}."
            )
        if Path(self.data).exists() and Path(self.data).resolve() == self.output.resolve():
            raise ValueError(f"--output {self.output} is the data itself. Choose another file.")
        if self.endpoint is not None:
            check_url(self.endpoint.url)
        _check_numbers(self)

    @property
    def num_samples(self) -> int:
        """Samples of each row."""
        return _SAMPLES[self.method] if self.samples is None else self.samples

    @property
    def samples_path(self) -> Path:
        """The file of all samples."""
        return self.output.with_suffix(".samples.jsonl")

    @property
    def receipt_path(self) -> Path:
        """The file of the receipt."""
        return self.output.with_suffix(".receipt.json")

    def options(self) -> dict[str, Any]:
        """All of these, as JSON can hold them."""
        facts = asdict(self)
        del facts["again"]
        return {name: str(value) if isinstance(value, Path) else value for name, value in facts.items()} | {
            "samples": self.num_samples
        }

    def facts(
        self,
        data_digest: str,
        num_rows: int,
        template: str | None,
        verifier: str,
        engine: str,
        verifier_source: str | None = None,
    ) -> dict[str, Any]:
        """What the samples depend on, and their verdicts.

        Args:
            data_digest: Of the rows.
            num_rows: How many there are.
            template: Of `rephrase`.
            verifier: Its name.
            engine: What generates.
            verifier_source: Hash of its source, of a function of the user's own.

        Raises:
            ValueError: If the model or the adapter is nowhere to be had, or is none.
        """
        from ..forgetting.reuse import model_files

        model = model_files(self.model).identity
        return {
            "method": self.method,
            "rows": num_rows,
            "data": data_digest,
            "samples": self.num_samples,
            **asdict(self.sampling),
            "template": template,
            "verifier": verifier,
            "verifier_source": verifier_source,
            "engine": engine,
            "endpoint_model": None if self.endpoint is None else self.endpoint.model or self.model,
            "dtype": self.dtype,
            "load_in_4bit": self.load_in_4bit,
            "model": model,
            "adapter": None if self.adapter is None else _adapter_identity(self.adapter),
        }


def _adapter_identity(name: str) -> dict[str, Any]:
    """What an adapter's own part in the answers depends on; the model that it is put on is named apart.

    Raises:
        ValueError: If it is no adapter.
    """
    config = adapter_config(name)
    folder = Path(name)
    if not folder.is_dir():
        return {"hub": name, "commit": config.parent.name}
    files = {file for pattern in _ADAPTER_FILES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def adapter_config(name: str) -> Path:
    """The adapter_config.json of an adapter, given its folder or hub id.

    Raises:
        ValueError: If it is no adapter, or nowhere to be had.
    """
    from transformers.utils import find_adapter_config_file

    from ..measures.inputs import is_adapter

    if not is_adapter(name):
        raise ValueError(
            f"--adapter {name}: this is no adapter, it has no adapter_config.json. A whole model goes into --model."
        )
    return Path(find_adapter_config_file(name))


def other_base(adapter: str, model: str) -> str | None:
    """The model that an adapter's config names, where that is another than the one that it is put on.

    Args:
        adapter: Folder or hub id of an adapter.
        model: Folder or hub id of the model that it is put on.

    Returns:
        Its name; None where the config names none, or one that is the same by name, place or files.
    """
    from ..forgetting.reuse import model_files

    base = json.loads(adapter_config(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or base == model:
        return None
    if Path(base).is_dir() and Path(model).is_dir():
        is_same = Path(base).samefile(model) or model_files(base).identity == model_files(model).identity
        return None if is_same else base
    return str(base)


def _check_numbers(settings: GenerateSettings) -> None:
    sampling, endpoint = settings.sampling, settings.endpoint
    whole = {
        "--samples": settings.num_samples,
        "--max-new-tokens": sampling.max_new_tokens,
        "--batch-size": settings.batch_size,
        "--rows": 1 if settings.rows is None else settings.rows,
        "--concurrency": 1 if endpoint is None else endpoint.concurrency,
    }
    for flag, value in whole.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{flag} must be a whole number of at least 1, got {value!r}.")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise ValueError(f"--temperature must be 0 or more, got {sampling.temperature}.")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"--top-p must be more than 0 and at most 1, got {sampling.top_p}.")
    if sampling.seed < 0:
        raise ValueError(f"--seed must be 0 or more, got {sampling.seed}.")
    if sampling.temperature == 0 and settings.num_samples > 1:
        raise ValueError(
            f"--temperature 0 draws nothing: all {settings.num_samples} samples of a row would be the same. Raise it, "
            "or take --samples 1."
        )
    if endpoint is not None and not endpoint.timeout > 0:
        raise ValueError(f"--timeout must be more than 0 seconds, got {endpoint.timeout}.")
    if endpoint is not None and endpoint.max_retries < 0:
        raise ValueError(f"--max-retries must be 0 or more, got {endpoint.max_retries}.")
