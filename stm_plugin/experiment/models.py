"""Where the models are that an experiment names, and what tells two of one name apart."""

import hashlib
import json

from ..demo.model import MODEL_ID, ModelNotFoundError, find_model


def model_folder(name: str) -> str:
    """What `from_pretrained` takes for a model: the demo's own is found without the hub."""
    return str(find_model().path) if name == MODEL_ID else name


def model_digest(name: str) -> str | None:
    """A hash of a model's files, or of its commit on the hub; None where it is not to be had."""
    from ..forgetting.reuse import model_files

    try:
        identity = model_files(model_folder(name)).identity
    except (ValueError, ModelNotFoundError):
        return None
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
