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


def write_tables(experiment: Experiment, output: Path) -> tuple[list[Path], list[str]]:
    """Write `table.md`, `results.json` and the plots into an experiment's folder, from its result files alone.

    Returns:
        The files, and what was left out of them and why.

    Raises:
        ValueError: If there is no result.
        ImportError: If matplotlib is not installed.
    """
    from .plots import write_plots

    summary = summarize(experiment, output)
    table, results = output / TABLE_NAME, output / RESULTS_NAME
    table.write_text(markdown(summary), encoding="utf-8")
    write_json(summary, results)
    return [table, results, *write_plots(summary, output)], summary["notes"]


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
    parts += _notes(list(summary["arms"].values()))
    if summary["missing"]:
        parts.append(f"Not done: {', '.join(summary['missing'])}.")
    parts += summary["notes"]
    parts.append("## Made with")
    parts += [f"- {line}" for line in _made_with(summary)]
    text = "\n\n".join(parts)
    return text.replace("\n\n- ", "\n- ").replace("shows\n- ", "shows\n\n- ").replace("with\n- ", "with\n\n- ") + "\n"


def _notes(arms: list[Facts]) -> list[str]:
    """What there is to note about arms, each once, with those that it is about if not all."""
    titles: dict[str, list[str]] = {}
    for arm in arms:
        for note in arm["notes"]:
            titles.setdefault(note, []).append(arm["title"])
    return [
        f"Note: {note}" if len(about) == len(arms) else f"Note on {', '.join(about)}: {note}"
        for note, about in titles.items()
    ]


def table(summary: Facts) -> str:
    """One row for the initial model and one for each arm, as a Markdown table."""
    tasks = [*summary["target"], *summary["non_target"]]
    head = ["arm", "seeds", "masked", "TI", "BWT", *tasks, "drift (nats/token)", "weight change (L2)"]
    head += ["preparing data (s)", "seconds"]
    rows = [head, ["---"] * len(head)]
    scores = [f"{summary['initial'][task]['score']:.4f}" for task in tasks]
    rows.append(["initial model", "", "", "", "", *scores, "0", "0", "", ""])
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
        _preparing_cell(arm),
        "-" if arm["training_seconds"] is None else f"{arm['training_seconds']['mean']:.0f}",
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


def _preparing_cell(arm: Facts) -> str:
    seconds = arm["preparing_seconds"]["mean"]
    if not arm["preparing_is_whole"]:
        return f"> {seconds_text(seconds)}"
    return seconds_text(seconds) if seconds else "-"


def seconds_text(seconds: float) -> str:
    """Seconds, whole ones where they are many."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _legend(summary: Facts) -> list[str]:
    documents = ", ".join(f"{name} {facts['documents']:,}" for name, facts in summary["initial"].items())
    metrics = ", ".join(f"{name} {facts['metric']}" for name, facts in summary["initial"].items())
    confidence = f"{100 * summary['confidence']:g} %"
    answers: dict[str, dict[str, None]] = {}
    for arm in summary["arms"].values():
        perplexity = arm["answers_perplexity"]
        answers.setdefault(arm["data"], {})[f"{perplexity['mean']:.2f} ({perplexity['std']:.2f})"] = None
    perplexities = [f"{name} {' or '.join(of_data)}" for name, of_data in answers.items()]
    of_answers = "Perplexity of the training answers under the initial model, mean (standard deviation) over rows"
    return [
        f"TI: relative change of the score on the target. BWT: mean relative change on the other tasks; below 0 is "
        f"forgetting. Mean over seeds, in brackets the {confidence} interval of a paired bootstrap over documents "
        "(which does not cover the choice of seeds), then the seeds' range.",
        f"Documents: {documents}. Metrics: {metrics}. Masked: share of the label tokens that the loss leaves out. "
        f"Drift: KL(initial || tuned) on the initial model's own answers to {summary['drift_prompts']} prompts. "
        "Seconds: training alone.",
        "Preparing data: what the arm's data cost before training, whichever run it was done in (it is done and "
        "measured once): scoring for STM; for strategies by two models the scoring by both and the training of the "
        "tuned model; for generated data all that `stm generate` did. >: a part of it was not measured here.",
        *([f"{of_answers}: {', '.join(perplexities)}."] if perplexities else []),
        *(_generated_line(name, facts) for name, facts in summary["generated"].items()),
    ]


def _generated_line(name: str, facts: Facts) -> str:
    """What came out of a generation."""
    rows, samples = facts["rows"], facts["samples"]
    before, after = (
        "-" if one["mean"] is None else f"{one['mean']:.2f} ({one['std']:.2f})"
        for one in (facts["perplexity"][when] for when in ("before", "after"))
    )
    own = rows["with_a_passing_sample"] / rows["written"] if rows["written"] else 0.0
    without = sum(samples["without_an_answer"].values())
    return (
        f"{name}, generated ({facts['method']}): {rows['read']:,} problems, {facts['samples_per_row']} "
        f"{'sample' if facts['samples_per_row'] == 1 else 'samples'} each, {samples['generated']:,} in all, of which "
        f"{percent(samples['acceptance_rate'], sign=False)} passed"
        + (f" ({without:,} more requests got no answer)" if without else "")
        + f"; {rows['written']:,} rows, {percent(own, sign=False)} of them with the model's own answer; "
        f"{facts['tokens_generated']:,} tokens generated; perplexity of the answers, mean (standard deviation) over "
        f"rows: {before} before, {after} after."
    )


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
    return lines + [_preparation_sentence(pair) for pair in summary["preparation"]]


def _preparation_sentence(pair: Facts) -> str:
    """How many times cheaper it was to prepare data for STM."""
    ratio = pair["seconds"] / pair["stm_seconds"]
    share = f"1/{ratio:,.0f}" if ratio >= 10 else f"1/{ratio:.1f}" if ratio >= 1 else f"{1 / ratio:.1f} times as much"
    return (
        f"Preparing data for {pair['stm']} took {seconds_text(pair['stm_seconds'])} s, {pair['title']} "
        f"{seconds_text(pair['seconds'])} s: **{share}**."
    )


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
