"""The command line, `innerloop VERB`: each verb is a typed function, its signature is its arguments."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils import logging as transformers_logging

from innerloop.cli.calibrate_bench import bench, calibrate
from innerloop.cli.compare import compare, sweep
from innerloop.cli.data import data_list, data_make, data_show, methods
from innerloop.cli.demo import demo
from innerloop.cli.eval import ask, eval_, lens
from innerloop.cli.train import train
from innerloop.errors import InputError, misfit, nearest
from innerloop.tasks import task_named
from innerloop.terminal.signals import end_when_asked
from innerloop.train.recipe import field_parser, load_recipe

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
        prog="innerloop",
        exit_on_error=False,
        description="Language models that reason in latents.",
        version=version("innerloop"),
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
        print(f"innerloop: {error}", file=sys.stderr)
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


def _spelled(verb: Callable[..., None], arguments: Sequence[str]) -> list[str]:
    """Return arguments as the parser reads them: --controls is --controls=true, and --seeds 0 1 is --seeds=[0,1]."""
    kinds = {f"--{name}": kind for name, kind in verb.__annotations__.items()}
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, is_given, value = argument.partition("=")
        kind = kinds.get(name, "")
        if kind == "bool" and not is_given and (not rest or rest[0].lower() not in ("true", "false", "yes", "no")):
            argument += "=true"
        elif "[int]" in kind:
            numbers = [value] if is_given else []
            while rest and (rest[0].isdigit() if numbers else not rest[0].startswith("--")):
                numbers.append(rest.pop(0))
            argument = f"{name}=[{','.join(numbers).strip('[]')}]" if numbers else argument
        found.append(argument)
    return found


def _run(arguments: list[str]) -> None:
    if not arguments:
        arguments = ["--help"]
    verb: Any = VERBS.get(arguments[0])
    words = [arguments[0]]
    if not arguments[0].startswith("-") and verb is None:
        raise InputError(
            f"there is no verb '{arguments[0]}'{nearest(arguments[0], VERBS)}; the verbs are {', '.join(VERBS)}"
        )
    if isinstance(verb, dict) and not {"-h", "--help"} & set(arguments[1:2]):
        words += arguments[1:2]
        if words[-1] not in verb:
            raise InputError(f"innerloop {words[0]} needs one of {', '.join(verb)}{nearest(words[-1], verb)}")
        verb = verb[words[-1]]
    extra: list[str] = []
    if callable(verb):
        arguments = [*words, *_spelled(verb, arguments[len(words) :])]
    is_open = tuple(words) in OPEN_ENDED
    if is_open:
        arguments, extra = _split_open(tuple(words), arguments)
    try:
        parsed = build_parser().parse_args(arguments)
    except ArgumentError as error:
        if not callable(verb):
            raise
        raise InputError(_misused(error, " ".join(words), verb)) from error
    values = parsed
    for word in words:
        values = values[word]
    settings: dict[str, Any] = values.as_dict()
    verb(**settings, **({OPEN_ENDED[tuple(words)]: extra} if is_open else {}))


def _misused(error: ArgumentError, words: str, verb: Callable[..., None]) -> str:
    """Say how a verb is used instead."""
    told, more = " ".join(str(error).split()), f"innerloop {words} --help lists what it takes"
    types = get_type_hints(verb)
    _, is_lacking, lacking = told.partition("arguments are required: ")
    _, is_unknown, unknown = told.partition("unrecognized arguments: ")
    option, is_bare, _ = told.removeprefix("argument ").partition(": expected one argument")
    if is_lacking:
        return (
            f"innerloop {words} needs {', '.join(name.split('.')[-1].upper() for name in lacking.split(', '))}; {more}"
        )
    if is_unknown:
        name = unknown.split()[0].partition("=")[0]
        close = nearest(name, [f"--{known}" for known in types]) if name.startswith("-") else ""
        return f"innerloop {words} does not take {name}{close}; {more}"
    if is_bare:
        return f"{option.split('/')[0]} needs a value; {more}"
    return misfit(error, types, "--")


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
