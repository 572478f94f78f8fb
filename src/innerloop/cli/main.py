"""The command line, `innerloop VERB`: each verb is a typed function, imported when it is called."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version

from jsonargparse import ArgumentError, ArgumentParser

from innerloop.cli.verb import Verb
from innerloop.disk.files import of_the_machine
from innerloop.errors import InputError, InputNote, nearest
from innerloop.terminal.progress import phases_told
from innerloop.terminal.signals import end_when_asked

VERBS = {  # each with its function and what it does
    "demo": ("demo:demo", "train and compare methods on a small task, on a CPU in minutes"),
    "methods": ("data:methods", "list the methods: family, paper, stages, what they need"),
    "data list": ("data:data_list", "list the tasks"),
    "data make": ("data:data_make", "write the splits of a task as JSONL, generated or converted"),
    "data show": ("data:data_show", "show how a method lays out examples"),
    "train": ("train:train", "train a recipe"),
    "eval": ("eval:eval_", "measure accuracy with its 95 % interval, and the cost per example"),
    "ask": ("look:ask", "answer one question, and show what the latents held at each loop"),
    "lens": ("look:lens", "look inside a run's answers, in one HTML file"),
    "serve": ("serve:serve_", "answer requests over HTTP, as OpenAI's clients send them"),
    "convert": ("convert:convert", "write released weights of a known format as a folder of ours"),
    "doctor": ("doctor:doctor", "tell what a folder is, whether it is whole, and what can use it"),
    "push": ("push:push", "share a run on the Hugging Face Hub, with a card"),
    "compare": ("compare:compare", "compare a suite's variants, or runs"),
    "sweep": ("compare:sweep", "train a recipe over a grid of values, or over points that a search draws"),
    "calibrate": ("calibrate_bench:calibrate", "choose the threshold of a stop rule on validation data"),
    "bench": ("calibrate_bench:bench", "measure time, memory and the share of the machine's floor"),
}
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return the exit code. Errors are one sentence on stderr; --debug shows where they arose."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [_underscored(a) for a in arguments if a != "--debug"]
    _quieten()
    end_when_asked()
    try:
        with _notes_told():
            _run(arguments)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be written at the end
        return 1  # as rich ends such a process
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
        if sentence := of_the_machine(error):
            print(f"innerloop: {sentence}", file=sys.stderr)
            return 2
        reason = " ".join(str(error).split())[:300]
        print(f"innerloop: {type(error).__name__}: {reason} (--debug shows where it arose)", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _notes_told() -> Iterator[None]:
    """Print notes of a block to stderr as they arise, each once; write out all that was printed when it ends."""
    told = set[str]()

    def show(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
        if not issubclass(category, InputNote):
            shown(message, category, *rest, **more)  # type: ignore[arg-type]
        elif is_first_process() and str(message) not in told:
            told.add(str(message))
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", InputNote)
        shown, warnings.showwarning = warnings.showwarning, show  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout.flush()


def is_first_process() -> bool:
    """Tell whether this process is the only one, or the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def _quieten() -> None:
    """Let transformers and huggingface_hub write errors alone, and draw no bars, without importing them for it."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if transformers := sys.modules.get("transformers"):  # which has read these already
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _underscored(argument: str) -> str:
    """Return an option as it is called here: --max-drop is --max_drop."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _run(arguments: list[str]) -> None:
    first, *_ = arguments = arguments or ["--help"]
    name = next((name for name in VERBS if arguments[: len(name.split())] == name.split()), None)
    if name is None:
        inner = [verb.split()[1] for verb in VERBS if verb.startswith(f"{first} ")]
        if inner and not set(HELP) & set(arguments):
            close = nearest(arguments[1], inner) if arguments[1:] else ""
            raise InputError(f"innerloop {first} needs one of {', '.join(inner)}{close}")
        if not inner and not first.startswith("-"):
            raise InputError(f"there is no verb '{first}'{nearest(first, VERBS)}; the verbs are {', '.join(VERBS)}")
        _overview().parse_args(["--help"] if inner else arguments)
        return
    module, _, function = VERBS[name][0].partition(":")
    room = import_module(f"innerloop.cli.{module}")
    verb, words = Verb(name, getattr(room, function)), arguments[len(name.split()) :]
    if not set(HELP) & set(words):
        room.console.quiet = not is_first_process()
        with phases_told(room.console):
            verb.run(words)
        return
    _, places, overrides = verb.split([word for word in words if word not in HELP])
    shows_fields = name in ("train", "data make") and places
    print(room.fields_help(*places, overrides=overrides) if shows_fields else verb.parser.format_help())
    raise SystemExit(0)


def _overview() -> ArgumentParser:
    """Return the parser that lists the verbs."""
    about = "Language models that reason in latents. innerloop VERB --help lists what a verb takes."
    parser = ArgumentParser(prog="innerloop", exit_on_error=False, description=about, version=version("innerloop"))
    verbs = parser.add_subcommands(dest="verb", metavar="VERB", title="verbs")
    for name, (_, what) in VERBS.items():
        verbs.add_subcommand(name, ArgumentParser(), help=what)
    return parser
