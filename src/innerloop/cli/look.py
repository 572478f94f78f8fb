"""Verbs that answer and look: ask, lens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from innerloop.checks.values import Count, Loops, Weight
from innerloop.cli.arguments import ModelArguments, SplitArguments, askable, console, going_on, progress_of
from innerloop.engine.options import Many
from innerloop.errors import InputError
from innerloop.model import run_folder


def ask(
    run: str,
    question: str,
    model: ModelArguments,
    max_new_tokens: Count = 128,
    temperature: Weight = 0.0,
    starts: Many = 1,
) -> None:
    """Answer one question, and show what the latents held at each loop.

    Args:
        run: a run's folder, or any model; a plain model writes freely.
        question: the question.
        model: who answers.
        max_new_tokens: the most tokens to write.
        temperature: 0 writes the likeliest tokens.
        starts: states that the latents begin at; the answer of those that come to rest is shown whole.
    """
    if not question.strip():
        raise InputError("the question is empty")
    if model.method is None and not run_folder.says_method(run):
        model = replace(model, method="cot")
    loaded = model.load_model(run)
    from innerloop.lens.latents import names_of_columns
    from innerloop.terminal.views import answer_view, starts_view

    loaded.encoder = loaded.encoder.reading(run_folder.recorded(run, "running_text", False))
    asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "starts": starts}
    tried = loaded.generate([question], **asked, trace=True)
    answer = min(tried, key=lambda one: one.change or 0.0)
    if starts > 1:
        console.print(starts_view(tried))
    console.print(answer_view(answer, loaded.tokenizer, *names_of_columns(loaded, question)))


def lens(
    run: str,
    split: SplitArguments,
    model: ModelArguments,
    examples: Count = 8,
    loops: Loops | None = None,
    out: str | None = None,
    max_new_tokens: Count | None = None,
    terminal: bool = False,
) -> None:
    """Look inside a run's answers: one HTML file with what every latent and loop shows, or a view in the terminal.

    Args:
        run: a run's folder, or any model with --method.
        split: what is answered.
        model: who answers.
        examples: how many examples the page holds.
        loops: another number of loops than the model was trained with.
        out: the file; by default RUN/lens.html for a run, and lens.html here for another model.
        max_new_tokens: the most tokens to write per example; by default as the task says.
        terminal: show the first example in the terminal, and write no file.
    """
    task = split.load_task(run)
    if model.method is None and not run_folder.says_method(run):
        raise InputError(f"{run} is no run, so say how it shall reason: --method NAME")
    asked = task.examples(split.split, 1 if terminal else examples)
    from innerloop.lens import look, page_path, terminal_view, write_page
    from innerloop.measure.result_cache import ResultCache, made_of

    path = None if terminal else page_path(run, out)
    loaded = model.load_model(run)
    loaded.encoder = loaded.encoder.reading(task.running_text)
    if path is None:
        console.print(terminal_view(loaded, task, asked[0], loops, max_new_tokens))
        return
    asked = askable([loaded], asked) or asked  # what it says of a question that it cannot be asked tells why
    decides: dict[str, Any] = {"loops": loops, "max_new_tokens": max_new_tokens}
    parts = ResultCache(path.with_suffix(".parts.json"), made_of(loaded, task, split.split, [], decides))
    with (
        going_on(parts, f"{len(parts.known)} examples", ""),
        progress_of(f"lens {loaded.method.name}", len(asked)) as advance,
    ):
        record = look(loaded, task, asked, split.split, run, loops, max_new_tokens, progress=advance, parts=parts)
    write_page(record, path)
    parts.forget()
    n_right = sum(one.is_right for one in record.looks)
    console.print(f"{path}: {len(asked)} examples, {n_right} right; open it in a browser", soft_wrap=True)
