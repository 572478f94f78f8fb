"""The command line, `innerloop VERB`: each verb is a typed function, its signature is its arguments."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils import logging as transformers_logging

from innerloop.demo import demo
from innerloop.errors import InputError, nearest
from innerloop.progress import end_when_asked
from innerloop.recipe import field_parser, load_recipe
from innerloop.tasks import task_named
from innerloop.verbs.compare import compare, sweep
from innerloop.verbs.data import data_list, data_make, data_show, methods
from innerloop.verbs.look import ask, eval_, lens
from innerloop.verbs.measure import bench, calibrate
from innerloop.verbs.train import train

VERBS: dict[str, Callable[..., None] | dict[str, Callable[..., None]]] = {
    "demo": demo,
    "methods": methods,
    "data": {"list": data_list, "make": data_make, "show": data_show},
    "train": train,
    "eval": eval_,
    "ask": ask,
    "lens": lens,
    "compare": compare,
    "sweep": sweep,
    "calibrate": calibrate,
    "bench": bench,
}
# verbs that take any --field: where these go, and which are the verb's own
OPEN_ENDED = {("train",): "overrides", ("data", "make"): "fields", ("compare",): "overrides", ("sweep",): "overrides"}
OWN = {
    ("train",): {"--resume"},
    ("data", "make"): {"--resume", "--out"},
    ("compare",): {
        "--out", "--baseline", "--seeds", "--workers", "--results", "--task", "--split", "--limit", "--timed",
    },
    ("sweep",): {
        "--grid", "--search", "--trials", "--seeds", "--out", "--workers", "--on", "--split", "--limit",
    },
}  # fmt: skip
LISTED: dict[tuple[str, ...], str] = {
    ("compare",): "",
    ("sweep",): "--grid",
}  # what may be given several times: '' are the positional arguments


def build_parser() -> ArgumentParser:
    """Return the parser of all verbs."""
    parser = ArgumentParser(
        prog="innerloop", exit_on_error=False, description="Language models that reason in latents."
    )
    verbs = parser.add_subcommands(dest="verb", metavar="VERB", title="verbs")
    for name, verb in VERBS.items():
        if callable(verb):
            verbs.add_subcommand(name, _verb_parser(verb), help=_first_line(verb))
            continue
        group = ArgumentParser(exit_on_error=False)
        verbs.add_subcommand(name, group, help="list, make and look at examples")
        inner = group.add_subcommands(dest="action", metavar="ACTION")
        for action, function in verb.items():
            inner.add_subcommand(action, _verb_parser(function), help=_first_line(function))
    return parser


def _verb_parser(function: Callable[..., None]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=_first_line(function))
    parser.add_function_arguments(function, as_positional=True, skip=set(OPEN_ENDED.values()))
    return parser


def _first_line(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return the exit code. Errors are one sentence on stderr; --debug shows where they arose."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [_underscored(a) for a in arguments if a != "--debug"]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    end_when_asked()
    try:
        _run(arguments)
    except (InputError, ArgumentError) as error:
        if debug:
            traceback.print_exc()
        print(
            f"innerloop: {' '.join(str(error).split()) if isinstance(error, ArgumentError) else error}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("innerloop: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a defect, or something a library refuses in its own words
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        print(f"innerloop: {type(error).__name__}: {reason} (--debug shows where it arose)", file=sys.stderr)
        return 1
    return 0


def _underscored(argument: str) -> str:
    """Return an option as it is called here: --max-drop is --max_drop."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _switched(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which what is yes or no has a value: --controls alone is --controls=true."""
    verb = VERBS.get(arguments[0])
    if verb is None or isinstance(verb, dict):  # what makes and shows data has no such options
        return list(arguments)
    switches = {f"--{name}" for name, kind in verb.__annotations__.items() if kind == "bool"}
    found: list[str] = []
    for argument, after in zip(arguments, [*arguments[1:], ""]):
        alone = argument in switches and after.lower() not in ("true", "false", "yes", "no")
        found.append(f"{argument}=true" if alone else argument)
    return found


def _run(arguments: list[str]) -> None:
    if not arguments:
        arguments = ["--help"]
    words = [a for a in arguments[:2] if not a.startswith("-")]
    if words and words[0] not in VERBS:
        raise InputError(f"there is no verb '{words[0]}'{nearest(words[0], VERBS)}; the verbs are {', '.join(VERBS)}")
    arguments = _switched(arguments)
    key = next((k for k in OPEN_ENDED if tuple(arguments[: len(k)]) == k), None)
    extra: list[str] = []
    if key is not None:
        arguments, extra = _split_open(key, arguments)
    parsed = build_parser().parse_args(arguments)
    settings: dict[str, Any] = parsed.as_dict()
    verb = VERBS[settings["verb"]]
    values = settings[settings["verb"]] or {}
    if isinstance(verb, dict):
        if values.get("action") is None:
            raise InputError(f"innerloop {settings['verb']} needs one of {', '.join(verb)}")
        verb, values = verb[values["action"]], values[values["action"]] or {}
    if key is not None:
        values[OPEN_ENDED[key]] = extra
    verb(**values)


def _split_open(key: tuple[str, ...], arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take the open-ended overrides out of a verb's arguments; with --help after a recipe or task, show its fields."""
    own, listed = OWN[key], LISTED.get(key)
    kept, rest = list(key), list(arguments[len(key) :])
    extra: list[str] = []
    several: list[str] = []
    subjects: list[str] = []
    while rest:
        argument = rest.pop(0)
        name, is_given, value = argument.partition("=")
        if name in ("-h", "--help"):
            kept.append(argument)
        elif not argument.startswith("-"):
            subjects.append(argument)
        elif name == listed and (is_given or rest):
            several.append(value if is_given else rest.pop(0))
        else:
            target = kept if name in own else extra
            if name == "--seeds":
                numbers = [value] if is_given else []
                while rest and (not numbers or rest[0].isdigit()):
                    numbers.append(rest.pop(0))
                target.append(f"--seeds=[{','.join(numbers).strip('[]')}]")
                continue
            target.append(argument)
            if not is_given and rest:
                target.append(rest.pop(0))
    if subjects and {"-h", "--help"} & set(kept) and key in (("train",), ("data", "make")):
        _print_fields(key, subjects[0], extra)
        raise SystemExit(0)
    if listed == "":
        kept += [json.dumps(subjects)] if subjects else []
    else:
        kept += subjects + ([f"{listed}={json.dumps(several)}"] if several else [])
    return kept, extra


def _print_fields(key: tuple[str, ...], subject: str, extra: Sequence[str]) -> None:
    """Print the fields that a recipe's sections, or a task, take."""
    if key == ("train",):
        recipe = load_recipe(subject, extra)
        sections = {"task": type(recipe.task), "backbone": type(recipe.backbone), "method": type(recipe.method)}
        field_parser(sections, f"innerloop train {subject}").print_help()
        print("train:\n  --train.NAME VALUE    transformers' TrainingArguments by name, and batch_size, max_length,")
        print("                        eval_limit, max_new_tokens, loss_chunk")
    else:
        parser = ArgumentParser(prog=f"innerloop data make {subject} --out DIR")
        parser.add_class_arguments(task_named(subject))
        parser.print_help()
