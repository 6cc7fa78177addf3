"""An experiment's table and sentences as Markdown, beside the same as JSON and plots."""

from pathlib import Path
from typing import Any

from ..forgetting.bootstrap import Interval
from ..forgetting.comparison import FORGETS, UNDECIDED, WITHIN
from ..forgetting.tables import interval_text, percent
from .config import Experiment
from .contrast import LESS, MORE
from .results import Facts, write_json
from .summary import summarize

TABLE_NAME = "table.md"
RESULTS_NAME = "results.json"


def write_tables(experiment: Experiment, output: Path) -> list[Path]:
    """Write `table.md`, `results.json` and the plots into an experiment's folder, from its result files alone.

    Returns:
        The files.

    Raises:
        ValueError: If there is no result.
        ImportError: If matplotlib is not installed.
    """
    from .plots import write_plots

    summary = summarize(experiment, output)
    table, results = output / TABLE_NAME, output / RESULTS_NAME
    table.write_text(markdown(summary), encoding="utf-8")
    write_json(summary, results)
    return [table, results, *write_plots(summary, output)]


def markdown(summary: Facts) -> str:
    """The whole document."""
    parts = [
        f"# {summary['title']}",
        f"Initial model: {summary['model']}. Target: {', '.join(summary['target'])}. Not trained for: "
        f"{', '.join(summary['non_target'])}.",
        table(summary),
        *_legend(summary),
        "## What it shows",
        *(f"- {sentence}" for sentence in sentences(summary)),
    ]
    if summary["missing"]:
        parts.append(f"Not done: {', '.join(summary['missing'])}.")
    parts += summary["notes"]
    parts.append("## Made with")
    parts += [f"- {line}" for line in _made_with(summary)]
    text = "\n\n".join(parts)
    return text.replace("\n\n- ", "\n- ").replace("shows\n- ", "shows\n\n- ").replace("with\n- ", "with\n\n- ") + "\n"


def table(summary: Facts) -> str:
    """One row for the initial model and one for each arm, as a Markdown table."""
    tasks = [*summary["target"], *summary["non_target"]]
    head = ["arm", "seeds", "masked", "TI", "BWT", *tasks, "drift (nats/token)", "weight change (L2)", "seconds"]
    rows = [head, ["---"] * len(head)]
    scores = [f"{summary['initial'][task]['score']:.4f}" for task in tasks]
    rows.append(["initial model", "", "", "", "", *scores, "0", "0", ""])
    rows += [_row(arm, tasks) for arm in summary["arms"].values()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _row(arm: Facts, tasks: list[str]) -> list[str]:
    masked = arm["masked_fraction"]
    return [
        arm["title"],
        str(len(arm["seeds"])),
        "-" if masked is None else percent(masked["mean"], sign=False),
        _mean_cell(arm["ti"]),
        _mean_cell(arm["bwt"]),
        *(f"{arm['tasks'][task]['score']:.4f}" for task in tasks),
        _spread_cell(arm["drift"], ".3g"),
        _spread_cell(arm["weight_change_l2"], ".3g"),
        _seconds_cell(arm),
    ]


def _mean_cell(mean: Facts) -> str:
    """The mean over seeds, the interval, and the range of the seeds where there are several."""
    text = percent(mean["mean"])
    if mean["interval"] is not None:
        text += f" [{interval_text(Interval(*mean['interval']))}]"
    of_seeds = [value for value in mean["of_seeds"] if isinstance(value, int | float)]
    if len(of_seeds) > 1:
        text += f"; seeds {percent(min(of_seeds))} to {percent(max(of_seeds))}"
    return text


def _spread_cell(spread: Facts | None, form: str) -> str:
    if spread is None:
        return "-"
    mean, low, high = (format(spread[name], form) for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def _seconds_cell(arm: Facts) -> str:
    text = "-" if arm["training_seconds"] is None else f"{arm['training_seconds']['mean']:.0f}"
    scoring = arm["scoring_seconds"]
    return text if scoring is None else f"{text} + {scoring['mean']:.0f}"


def _legend(summary: Facts) -> list[str]:
    documents = ", ".join(f"{name} {facts['documents']:,}" for name, facts in summary["initial"].items())
    metrics = ", ".join(f"{name} {facts['metric']}" for name, facts in summary["initial"].items())
    confidence = f"{100 * summary['confidence']:g} %"
    answers = {arm["data"]: arm["answers_perplexity"] for arm in reversed(summary["arms"].values())}
    perplexities = [f"{name} {facts['mean']:.2f} ({facts['std']:.2f})" for name, facts in reversed(answers.items())]
    return [
        f"TI: relative change of the score on the target. BWT: mean relative change on the other tasks; below 0 is "
        f"forgetting. Mean over seeds, in brackets the {confidence} interval of a paired bootstrap over documents "
        "(which does not cover the choice of seeds), then the seeds' range.",
        f"Documents: {documents}. Metrics: {metrics}. Masked: share of the label tokens that the loss leaves out. "
        f"Drift: KL(initial || tuned) on the initial model's own answers to {summary['drift_prompts']} prompts. "
        "Seconds: training, + scoring where a run scored its data (later runs find the scores).",
        f"Perplexity of the training answers under the initial model, mean (standard deviation) over rows: "
        f"{', '.join(perplexities)}.",
    ]


def sentences(summary: Facts) -> list[str]:
    """Answers to the experiment's questions, each with its figures and a verdict."""
    lines = []
    for arm in summary["arms"].values():
        if len(arm["seeds"]) > 1 or len(summary["arms"]) < 4:
            lines.append(f"Does {arm['title']} forget? BWT {_mean_cell(arm['bwt'])}: **{_forgetting_verdict(arm)}**.")
    for pair in summary["pairs"]:
        first, second = (summary["arms"][pair[name]] for name in ("first", "second"))
        words = {MORE: "yes", LESS: "no, it forgets more"}
        lines.append(_pair_sentence("forget less than", "bwt", pair, first, second, words))
        words = {MORE: "more", LESS: "less"}
        lines.append(_pair_sentence("gain more on the target than", "ti", pair, first, second, words))
    return lines


def _forgetting_verdict(arm: Facts) -> str:
    return {FORGETS: "yes", WITHIN: "no"}.get(arm["verdict"], UNDECIDED)


def _pair_sentence(verb: str, name: str, pair: Facts, first: Facts, second: Facts, words: dict[str, str]) -> str:
    facts = pair[name]
    scores = f"{name.upper()} {percent(first[name]['mean'])} against {percent(second[name]['mean'])}"
    interval = "no interval" if facts["interval"] is None else _points(facts["interval"])
    seeds = " and ".join(map(str, dict.fromkeys(facts["num_seeds"])))
    over = f"{facts['num_documents']:,} documents and {seeds} {'seed' if seeds == '1' else 'seeds'}"
    verdict = words.get(facts["verdict"], facts["verdict"])
    return f"Does {first['title']} {verb} {second['title']}? {scores}, {interval}, over {over}: **{verdict}**."


def _points(ends: list[Any]) -> str:
    low, high = (percent(float(end)).removesuffix(" %") for end in ends)
    return f"a difference of {low} to {high} points"


def _made_with(summary: Facts) -> list[str]:
    lines = []
    for facts in summary["environments"]:
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        machine = facts["machine"]
        gpus = f", {len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else ", no GPU"
        first, last = (date[:10] for date in facts["dates"])
        dates = first if first == last else f"{first} to {last}"
        commit = f", commit {facts['commit']}" if facts["commit"] else ""
        where = f"{machine['platform']}, {machine['cores']} cores{gpus}"
        lines.append(f"{dates}, {facts['results']} results: {where}; {versions}{commit}")
    return lines
