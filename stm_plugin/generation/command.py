"""The command `stm generate`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..measures.inputs import DTYPES, add_template_kwargs
from .data import GROUND_TRUTH
from .engines import Sampling
from .settings import METHODS, REJECTED, Endpoint, GenerateSettings

EPILOG = """\
two ways:
  stm generate --method self-output --model MODEL --data chats.jsonl --output self.jsonl --run-model-written-code
      the model answers each problem 32 times; of the answers that pass, the one of lowest perplexity is kept
  stm generate --method rephrase --model MODEL --data chats.jsonl --output rephrased.jsonl --run-model-written-code
      the model is shown the human answer and writes it in its own words
  --endpoint http://localhost:8000/v1 lets a server (vLLM, SGLang, TGI, ...) generate; --model still scores, here

DATA has a chat a row, in `messages`, or in `prompt` and `completion` as lists of messages (no plain text, which the
model would not be asked as it is trained on).

OUTPUT.jsonl has the rows of the data with the model's answers, for `stm sft`, TRL and Axolotl; OUTPUT.samples.jsonl
every sample with its verdict and perplexity; OUTPUT.receipt.json what came out. Stopped by whatever, the same command
goes on where it was; with another --verifier, what is there is judged anew, and more --samples or --rows are added.

verifiers, taken by the form of the rows where --verifier names none: tests (test_list), math (solution with
\\boxed{}), number (answer with #### NUMBER), choice (choices, answerKey); by name only: exact, and a function of your
own, package.module:function, called with (answer, row)

exit status: 0; 1 for an error, or where requests got no answer (start again to ask again); 130 after Ctrl-C
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stm generate`."""
    sampling, endpoint = Sampling(), Endpoint("")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--method", required=True, choices=METHODS, help="what the model is asked for")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="folder or hub id of a model or an adapter; it scores too"
    )
    parser.add_argument("--adapter", metavar="ADAPTER", help="put on --model")
    parser.add_argument(
        "--data", required=True, metavar="DATA", help=".jsonl with human answers, or a data set that `datasets` loads"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the .jsonl to write")
    parser.add_argument("--samples", type=int, metavar="N", help="of each row (32; rephrase: 1)")
    numbers: tuple[tuple[str, type, str, str, Any], ...] = (
        ("--temperature", float, "T", "of the draws", sampling.temperature),
        ("--top-p", float, "P", "share of probability that is drawn from", sampling.top_p),
        ("--max-new-tokens", int, "N", "longest answer; a longer one is cut and rejected", sampling.max_new_tokens),
        ("--seed", int, "N", "of the draws", sampling.seed),
        ("--batch-size", int, "N", "answers generated at once, in process", GenerateSettings.batch_size),
    )
    for flag, kind, metavar, text, default in numbers:
        parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; auto (the default): as they are saved"
    )
    parser.add_argument("--load-in-4bit", action="store_true", help="load the model in 4 bit (NF4)")
    parser.add_argument("--device", help="such as cuda:1 (default: the first GPU, or else the CPU)")
    parser.add_argument(
        "--verifier", metavar="NAME", help="says which answers pass (default: by the form of the rows)"
    )
    parser.add_argument(
        "--run-model-written-code",
        dest="run_model_code",
        action="store_true",
        help="run code that the model writes, contained (tests needs it)",
    )
    parser.add_argument(
        "--template", type=Path, metavar="FILE", help="of rephrase: text with {instruction} and {answer}"
    )
    add_template_kwargs(parser, "of each chat is given, and the rows that are written")
    parser.add_argument(
        "--rejected", choices=REJECTED, default=GROUND_TRUTH, help="where no sample passes (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="take the first N rows")
    parser.add_argument("--again", action="store_true", help="start anew, whatever is there")
    server = parser.add_argument_group("a server that generates")
    server.add_argument(
        "--endpoint", metavar="URL", help="speaks OpenAI's chat completions (needs the extra `generate`)"
    )
    server.add_argument("--endpoint-model", metavar="NAME", help="the model's name there (default: --model)")
    server.add_argument(
        "--concurrency", type=int, metavar="N", help=f"most requests at a time ({endpoint.concurrency})"
    )
    server.add_argument("--timeout", type=float, metavar="S", help=f"seconds for one request ({endpoint.timeout:.0f})")
    server.add_argument(
        "--max-retries", type=int, metavar="N", help=f"of a request that failed ({endpoint.max_retries})"
    )
    server.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="variable that has the key (OPENAI_API_KEY, which is sent to hosts of openai.com only)",
    )


def main(args: argparse.Namespace) -> int:
    """Run `stm generate`.

    Returns:
        The exit status: 0; 1 if requests got no answer; 130 after Ctrl-C.

    Raises:
        ValueError: As `generate_data` does, or for options that do not go together.
    """
    settings = settings_of(args)
    from .run import generate_data

    try:
        receipt = generate_data(settings, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("Stopped. What has been generated stays; start again to go on.", file=sys.stderr)
        return 130
    print("\n".join(summary(receipt, settings)))
    equal = receipt["rows"]["of_equal_samples"]
    if settings.sampling.temperature > 0 and equal > receipt["rows"]["read"] / 2:
        print(
            f"stm: the samples of {equal:,} rows are all the same, as if nothing was drawn. Does the server heed the "
            "temperature? `transformers serve` does only with do_sample: true in the model's generation_config.json.",
            file=sys.stderr,
        )
    failed = receipt["samples"]["without_an_answer"]
    for reason, number in failed.items():
        print(f"stm: {number} requests got no answer: {reason}", file=sys.stderr)
    if failed:
        print("stm: their rows do with what there is. Start again to ask again.", file=sys.stderr)
    return int(bool(failed))


def settings_of(args: argparse.Namespace) -> GenerateSettings:
    """The settings that the flags say.

    Raises:
        ValueError: For values that are not allowed.
    """
    of_server = {
        "model": args.endpoint_model,
        "concurrency": args.concurrency,
        "timeout": args.timeout,
        "max_retries": args.max_retries,
        "api_key_env": args.api_key_env,
    }
    given = {name: value for name, value in of_server.items() if value is not None}
    if given and args.endpoint is None:
        flags = ["--endpoint-model" if name == "model" else f"--{name.replace('_', '-')}" for name in given]
        raise ValueError(f"{', '.join(flags)}: of no use without --endpoint URL.")
    names = ["method", "model", "data", "output", "adapter", "samples", "batch_size", "dtype", "load_in_4bit"]
    names += ["device", "verifier", "run_model_code", "template", "chat_template_kwargs", "rejected", "rows", "again"]
    return GenerateSettings(
        **{name: getattr(args, name) for name in names},
        sampling=Sampling(args.temperature, args.top_p, args.max_new_tokens, args.seed),
        endpoint=None if args.endpoint is None else Endpoint(args.endpoint, **given),
    )


def summary(receipt: dict[str, Any], settings: GenerateSettings) -> list[str]:
    """What came out, in lines."""
    samples, rows, seconds = receipt["samples"], receipt["rows"], receipt["seconds"]
    before, after = (_mean_std(receipt["perplexity"][name]) for name in ("before", "after"))
    rejected = ", ".join(f"{reason} {number:,}" for reason, number in samples["rejected"].items())
    other = (
        f"{rows['dropped']:,} are dropped" if rows["dropped"] else f"{rows['ground_truth']:,} keep the human answer"
    )
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    return [
        f"Samples: {samples['passed']:,} of {samples['generated']:,} pass ({samples['acceptance_rate']:.1%})"
        + (f"; rejected: {rejected}." if rejected else "."),
        f"Rows: {rows['with_a_passing_sample']:,} of {rows['read']:,} have one that passes "
        f"({rows['acceptance_rate']:.1%}); {other}.",
        f"Perplexity, mean (standard deviation) over rows: human answers {before}, written {after}.",
        f"Tokens generated: {receipt['tokens_generated']:,}. Seconds: {seconds['total']:.1f} ({phases}).",
        f"{settings.output} ({rows['written']:,} rows), {settings.samples_path.name}, {settings.receipt_path.name}",
    ]


def _mean_std(facts: dict[str, Any]) -> str:
    return "-" if facts["mean"] is None else f"{facts['mean']:.2f} ({facts['std']:.2f})"
