"""What it cost to prepare the data of a run, in seconds: generating them, scoring them, training a tuned model."""

import json
import time
from pathlib import Path

from ..constants import RECEIPT_NAME
from ..options import STRATEGIES_BY_TWO_MODELS
from ..scoring.store import MANIFEST
from .config import RunName
from .generating import receipt_path
from .results import Facts, read_json, run_path, write_json
from .settings import Settings

_OF_A_RECEIPT = ("method", "rows", "samples", "perplexity", "tokens_generated", "seconds", "machine")


class ScoringClock:
    """Takes the time of scoring, from its making on, and keeps the seconds of each entry that is new.

    What a run costs that finds the scores of another is in a file for each entry, `scoring/ENTRY.json`: it is there
    also where the run that made the scores failed afterwards.

    Args:
        scores: Folder of the entries.
        output: Folder of the experiment's results.
    """

    def __init__(self, scores: Path, output: Path) -> None:
        self._scores, self._output = scores, output
        self._before = _names(scores)
        self._started = time.time()

    def stop(self) -> bool:
        """Keep the seconds of what has been scored by now.

        Returns:
            Whether there was anything.
        """
        ended = time.time()
        made = {
            name: (self._scores / name / MANIFEST).stat().st_mtime
            for name in _names(self._scores) - self._before
            if (self._scores / name / MANIFEST).is_file()
        }
        names = sorted(made, key=made.__getitem__)
        ends = [*(made[name] for name in names[:-1]), ended]  # to the last one belongs all that is made of the scores
        last = self._started
        for name, end in zip(names, ends, strict=False):
            facts = {
                "seconds": round(max(0.0, end - last), 3),
                "is_whole": f".{name}.partial" not in self._before,  # else a part was scored in an earlier start
            }
            write_json(facts, _scoring_path(self._output, name))
            last = end
        return bool(names)


def scores_entries(model: Path) -> list[str]:
    """Names of the entries of scores that a run's masks were made by, as the receipt beside its model has them."""
    receipt = json.loads((model / RECEIPT_NAME).read_text(encoding="utf-8"))
    keys = ("scores_entry", "tuned_scores_entry")
    return [Path(receipt[key]).name for key in keys if receipt.get(key) is not None]


def preparing(settings: Settings, entries: list[str], output: Path) -> Facts:
    """Seconds that preparing a run's data took, whenever and for whichever run that was done.

    Args:
        settings: The run's settings.
        entries: Names of the entries of scores that it was masked by.
        output: Folder of the experiment's results.

    Returns:
        `seconds`, the sum of `generating`, `scoring` and `tuned_model`; `is_whole`, whether nothing is missing in it
        that was not measured here, such as the training of a tuned model from elsewhere.
    """
    parts = {"generating": 0.0, "scoring": 0.0, "tuned_model": 0.0}
    is_whole = True
    if settings["generated"] is not None:
        receipt = read_json(receipt_path(output, settings["data"]))
        assert receipt is not None, "data are generated before they are trained on"
        parts["generating"] = receipt["seconds"]["total"]
    for name in entries:
        scoring = read_json(_scoring_path(output, name))
        parts["scoring"] += 0.0 if scoring is None else scoring["seconds"]
        is_whole &= scoring is not None and scoring["is_whole"]
    tuned = settings["tuned_run"]
    if tuned is not None:
        result = read_json(run_path(output, RunName(tuned["arm"], tuned["seed"])))
        assert result is not None, "a tuned model's run is done before those that take its model"
        own = preparing_of(result)
        parts["tuned_model"] = result["seconds"]["training"] + own["seconds"]
        is_whole &= own["is_whole"]
    elif settings["options"].get("stm_strategy") in STRATEGIES_BY_TWO_MODELS:
        is_whole = False
    parts = {name: round(seconds, 3) for name, seconds in parts.items()}
    return {"seconds": round(sum(parts.values()), 3), "is_whole": is_whole, **parts}


def preparing_of(result: Facts) -> Facts:
    """What `preparing` says in a run's result; of one from before it was kept, the scoring that the run did itself."""
    found: Facts = result.get("preparing") or {
        "seconds": result["seconds"]["scoring"] if result["scoring"] == "made" else 0.0,
        "is_whole": result["scoring"] != "found",
    }
    return found


def generation_facts(settings: Settings, output: Path) -> Facts | None:
    """What there is to say of a run's generated data; None for others."""
    if settings["generated"] is None:
        return None
    receipt = read_json(receipt_path(output, settings["data"]))
    assert receipt is not None, "data are generated before they are trained on"
    return {name: receipt[name] for name in _OF_A_RECEIPT}


def _scoring_path(output: Path, name: str) -> Path:
    return output / "scoring" / f"{name}.json"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
