"""The lens in a terminal: one example, its answer as `innerloop ask` shows it, and its gold steps."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from innerloop.engine.latent_model import LatentModel
from innerloop.lens.latents import names_of_columns
from innerloop.lens.record import answer_alone, look_at
from innerloop.tasks import Task
from innerloop.terminal.views import answer_view
from innerloop.text.examples import Example


def terminal_view(
    model: LatentModel, task: Task, example: Example, loops: int | None = None, max_new_tokens: int | None = None
) -> Group:
    """Answer an example and return what there is to see (see `look` for the arguments)."""
    answer = answer_alone(model, task, example, loops, max_new_tokens)
    one, _ = look_at(model, task, example, answer, loops)
    lines: list[RenderableType] = [
        Text.assemble(("question: ", "dim"), one.question),
        answer_view(answer, model.tokenizer, *names_of_columns(model, example.question, loops)),
    ]
    for step in one.shown:
        mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}[step.is_right]
        lines.append(
            Text(f"{mark} {step.where}: {step.decoded or '(nothing)'}, gold {step.gold or 'not known'}", style=style)
        )
    lines += [Text(f"gold step {i}: {step}", style="dim") for i, step in enumerate(one.steps, 1)]
    verdict = ("correct", "green") if one.is_right else ("wrong", "red")
    lines.append(Text.assemble(f"predicted {one.predicted}, gold {one.gold}: ", verdict))
    if one.stop is not None:
        lines.append(Text(one.stop.why))
    return Group(*lines, *(Text(note, style="dim") for note in one.notes))
