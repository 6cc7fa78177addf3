"""Generating a data set of a model's own answers; whatever ends it, the next start goes on where it was."""

import functools
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..experiment.results import write_json
from ..loading import Source
from ..measures.inputs import LoadedModel, Row, load_model
from .access import find_key
from .choosing import choose
from .data import GROUND_TRUTH, SOURCE, problems_of, read_data, rows_digest, with_answer, with_template_kwargs
from .engines import ERROR, LENGTH, Engine, EngineError, Generated, Request
from .progress import Progress, Say
from .prompts import read_template, rephrase_messages
from .receipt import Receipt, make_receipt
from .samples import Sample, SamplesFile, write_lines
from .settings import REPHRASE, GenerateSettings, other_base
from .verifiers import EMPTY, make_verifier

logger = logging.getLogger(__name__)

CUT = "cut"
"""The verdict on an answer that was cut at the limit of new tokens; no verifier is asked about it."""

ERRORS_IN_A_ROW, ROWS_IN_A_ROW = 20, 3
"""So many requests that the server failed, of so many rows, none with a response between them: it is gone.

What is wrong with a request itself (`Generated.is_refused`) says nothing about the server.
"""
_JUDGED_TOGETHER = 64


def generate_data(settings: GenerateSettings, say: Say = lambda _: None, engine: Engine | None = None) -> Receipt:
    """Generate answers, verify and score them, and write the data set of the best ones.

    Beside `output` lie all samples (`.samples.jsonl`) and the receipt (`.receipt.json`). What a start that was stopped
    has generated is used, not generated again.

    Args:
        settings: What to generate.
        say: Takes a line of progress at a time.
        engine: What generates, in the place of the one that the settings ask for.

    What there is of another verifier, or of fewer samples or rows, is used too: verdicts are given anew, and what is
    missing is generated.

    Returns:
        The receipt. `samples.without_an_answer` counts requests that failed: a further start asks for them again.

    Raises:
        ValueError: For data, a verifier or a model that do not go together; for samples of other settings; if another
            run works on the same output; or if no row is left.
        EngineError: If nothing can be generated. What there is stays.
    """
    from filelock import FileLock, Timeout

    output = settings.output
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0):
            return _Run(settings, say, engine).run()
    except Timeout:
        raise ValueError(f"another stm generate works on {output}. Wait for it, or stop it.") from None


class _Run:
    """One start."""

    file: SamplesFile

    def __init__(self, settings: GenerateSettings, say: Say, engine: Engine | None) -> None:
        self.settings, self.say, self.given_engine = settings, say, engine
        rows = read_data(settings.data, settings.rows)
        self.rows = with_template_kwargs(rows, settings.chat_template_kwargs)
        self.problems = problems_of(self.rows, settings.data)
        self.verifier = make_verifier(settings.verifier, self.rows, run_model_code=settings.run_model_code)
        self.template = read_template(settings.template) if settings.method == REPHRASE else None
        self.requests = self._requests()
        self.failed: Counter[str] = Counter()
        self.num_refused = 0

    def _requests(self) -> list[Request]:
        requests = []
        for row, problem in enumerate(self.problems):
            messages = problem.messages
            if self.template is not None:
                where = f"{self.settings.data}, row {row}"
                messages = rephrase_messages(self.template, messages, problem.answer, where)
            samples = range(self.settings.num_samples)
            requests += [Request(row, sample, messages, problem.template_kwargs) for sample in samples]
        return requests

    def run(self) -> Receipt:
        settings = self.settings
        engine = "endpoint" if settings.endpoint is not None else "transformers"
        engine = engine if self.given_engine is None else type(self.given_engine).__name__
        digest = rows_digest(self.rows, settings.data)
        facts = settings.facts(digest, len(self.rows), self.template, self.verifier.name, engine, self.verifier.source)
        if settings.adapter is not None and (base := other_base(settings.adapter, settings.model)) is not None:
            logger.warning(
                "The adapter %s says that it is for %s, and is put on %s.", settings.adapter, base, settings.model
            )
        self._look_at_output()
        self.file = SamplesFile(
            settings.samples_path, facts, lambda number: rows_digest(self.rows[:number], settings.data)
        )
        try:
            return self._work(facts)
        finally:
            self.file.close()

    def _look_at_output(self) -> None:
        """Remove what is there where that is asked for; nobody else's file is written over."""
        settings = self.settings
        if settings.again:
            for path in (settings.output, settings.samples_path, settings.receipt_path):
                path.unlink(missing_ok=True)
        elif settings.output.exists() and not settings.samples_path.exists():
            raise ValueError(
                f"{settings.output} is there already, without {settings.samples_path.name}, which would say where it "
                "is from. Choose another --output, or write over it with --again."
            )

    def _work(self, facts: dict[str, Any]) -> Receipt:
        settings, file = self.settings, self.file
        to_do = [request for request in self.requests if (request.row, request.sample) not in file.samples]
        if file.samples:
            self.say(f"{len(file.samples)} of {len(self.requests)} samples are there already.")
        if to_do and settings.endpoint is not None and self.given_engine is None:
            find_key(settings.endpoint.url, settings.endpoint.api_key_env)
        known = len(file.ground_truth)
        if known < len(self.rows):  # first: what cannot be scored shows before anything is generated
            self.say(f"Scoring the {len(self.rows) - known} human answers ...")
            file.set_ground_truth([*file.ground_truth, *self._perplexities(self.rows[known:])])
        not_judged = [sample for sample in file.in_order() if sample.verdict is None]
        if not_judged:
            self.say(f"Verifying {len(not_judged)} samples that are there ...")
        for start in range(0, len(not_judged), _JUDGED_TOGETHER):
            self._judge(not_judged[start : start + _JUDGED_TOGETHER])
        if to_do:
            self._generate(to_do)
        if not file.samples:
            raise EngineError(f"no request got an answer: {_counted(self.failed)}.")
        chosen = choose(file.in_order())
        rows, perplexities = self._output(chosen)
        file.tidy()
        receipt = make_receipt(facts, settings.options(), file, chosen, perplexities, self.failed, self.num_refused)
        write_json(receipt, settings.receipt_path)
        if not rows:
            settings.output.unlink(missing_ok=True)
            raise ValueError(
                "no row has a sample that passes, so that --rejected drop leaves nothing to write: "
                f"{_counted(receipt['samples']['rejected'])}. All samples are in {settings.samples_path}."
            )
        write_lines(rows, settings.output)
        return receipt

    def _output(self, chosen: dict[int, Sample]) -> tuple[list[Row], list[float]]:
        """Rows of the output, and the perplexity of each one's answer."""
        rows, perplexities = [], []
        for index, row in enumerate(self.rows):
            sample = chosen.get(index)
            if sample is not None:
                assert sample.perplexity is not None
                rows.append(with_answer(row, sample.text, self.settings.method))
                perplexities.append(sample.perplexity)
            elif self.settings.rejected == GROUND_TRUTH:
                rows.append(row | {SOURCE: GROUND_TRUTH})
                perplexities.append(self.file.ground_truth[index])
        return rows, perplexities

    def _generate(self, to_do: Sequence[Request]) -> None:
        """Ask for samples; keep each as it comes, and judge them some at a time."""
        waiting: list[Sample] = []
        open_requests = {(request.row, request.sample) for request in to_do}
        progress = Progress(self.file, self.settings.num_samples, len(self.rows), self.say)
        failed_rows: list[int] = []
        engine = self.given_engine or self._engine()
        answers = engine.generate(to_do)
        try:
            for answer in self._timed(answers):
                open_requests.remove((answer.row, answer.sample))
                if answer.finish == ERROR:
                    self.failed[answer.error or "no reason given"] += 1
                    if answer.is_refused:
                        self.num_refused += 1
                        failed_rows.clear()
                    else:
                        failed_rows.append(answer.row)
                        self._check_server(failed_rows, answer)
                    continue
                failed_rows.clear()
                progress.tell()
                sample = Sample(answer.row, answer.sample, answer.text, answer.num_tokens, answer.finish)
                self.file.add(sample)
                waiting.append(sample)
                if len(waiting) >= _JUDGED_TOGETHER:
                    self._judge(waiting)
                    waiting = []
            self._judge(waiting)
            progress.tell(at_once=True)
        finally:
            if isinstance(answers, Generator):
                answers.close()
            engine.close()
        if open_requests:
            self.failed["the engine left it out"] += len(open_requests)

    def _engine(self) -> Engine:
        settings = self.settings
        if settings.endpoint is None:
            from .local import TransformersEngine

            model, tokenizer = self.loaded
            return TransformersEngine(model, tokenizer, settings.sampling, settings.batch_size)
        from .endpoint import EndpointEngine

        endpoint = settings.endpoint
        return EndpointEngine(
            endpoint.url,
            endpoint.model or settings.model,
            settings.sampling,
            api_key=find_key(endpoint.url, endpoint.api_key_env),
            concurrency=endpoint.concurrency,
            timeout=endpoint.timeout,
            max_retries=endpoint.max_retries,
        )

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The model, with its adapter; loaded when it is first needed."""
        settings = self.settings
        name, base = settings.model, None
        if settings.adapter is not None:
            name, base = settings.adapter, Source(settings.model)
        with self._spent("load"):
            return load_model(
                name,
                base=base,
                dtype=settings.dtype,
                load_in_4bit=settings.load_in_4bit,
                device=settings.device,
            )

    def _judge(self, samples: Sequence[Sample]) -> None:
        """Verify samples, score those that have no perplexity yet, and keep what came of it."""
        if not samples:
            return
        verdicts = {sample.key: CUT if sample.finish == LENGTH else EMPTY for sample in samples}
        asked = [sample for sample in samples if sample.finish != LENGTH and not sample.is_empty]
        with self._spent("verify"):
            found = (
                self.verifier.verify_all([(sample.text, self.rows[sample.row]) for sample in asked]) if asked else []
            )
        verdicts |= {sample.key: verdict for sample, verdict in zip(asked, found, strict=True)}
        to_score = [sample for sample in samples if sample.perplexity is None and not sample.is_empty]
        answers = [with_answer(self.rows[sample.row], sample.text, "") for sample in to_score]
        perplexities = {sample.key: sample.perplexity for sample in samples}
        perplexities |= dict(zip([sample.key for sample in to_score], self._perplexities(answers), strict=True))
        self.file.judge(
            sample._replace(verdict=verdicts[sample.key], perplexity=perplexities[sample.key]) for sample in samples
        )

    def _perplexities(self, rows: Sequence[Row]) -> list[float]:
        """Perplexity of each row's answer, `exp` of the mean NLL of its tokens, as `stm measure perplexity` has it."""
        from ..measures.perplexity import measure_perplexity

        if not rows:
            return []
        model, tokenizer = self.loaded
        with self._spent("score"):
            return measure_perplexity(model, tokenizer, {self.settings.data: rows})[self.settings.data].rows

    @contextmanager
    def _spent(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.file.spent(phase, time.monotonic() - started)

    def _timed(self, answers: Iterator[Generated]) -> Iterator[Generated]:
        """What an engine yields, the time that it takes counted."""
        while True:
            with self._spent("generate"):
                answer = next(answers, None)
            if answer is None:
                return
            yield answer

    def _check_server(self, rows: Sequence[int], last: Generated) -> None:
        """Raise EngineError where the server seems to be gone.

        Args:
            rows: Row of each request that the server failed since its last response.
            last: What the last of them got.
        """
        in_process = self.settings.endpoint is None and self.given_engine is None
        if in_process or len(rows) < ERRORS_IN_A_ROW or len(set(rows)) < ROWS_IN_A_ROW:
            return
        raise EngineError(
            f"{len(rows)} requests in a row got no answer, the last because: {last.error or 'no reason given'}. "
            f"{len(self.file.samples)} of {len(self.requests)} samples are kept in {self.settings.samples_path}. "
            "See to the server, and start again to go on."
        )


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} ({number} times)" for reason, number in reasons.items())
