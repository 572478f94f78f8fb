"""The card of a shared model: what it is, what it was trained and measured on, and how it is loaded.

print(card("runs/chain/codi", "me/codi-chain"))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from innerloop.errors import InputError
from innerloop.methods import method_named
from innerloop.model.run_folder import RUN_CHECKPOINT, SETTINGS, identity, read_settings
from innerloop.model.shared_files import recipe_of, without_machine

RESULT = "result.json"  # of a run, beside its checkpoint; of what is shared, in it
AGAIN = "It is trained again by\n\n    hf download {} config.yaml --local-dir .\n    innerloop train config.yaml\n\n"
TAGS = ["innerloop", "latent-reasoning", "reasoning"]
COSTS = {  # of result.json, with the words of the card
    "passes": "passes of the decoder",
    "positions": "positions read",
    "thought_tokens": "latents and written steps",
    "loops": "iterations of the latents",
    "flops": "FLOPs",
}


def card(run: str | Path, repo: str) -> str:
    """Return README.md of a run, or of a folder that was saved by hand.

    Args:
        run: the folder; what was measured of other weights than lie there now is left out.
        repo: the name under which it is shared.
    """
    run = Path(run)
    folder = run / RUN_CHECKPOINT if (run / RUN_CHECKPOINT / SETTINGS).exists() else run
    settings, result, recipe = read_settings(folder), measured(run), recipe_of(run)
    name = str(settings["method"]["name"])
    thought = folder / "custom_generate/thought.json"
    told = json.loads(thought.read_text()) if thought.exists() else None
    parts = [
        f"# {repo.rpartition('/')[2]}",
        _about(name),
        _loading(repo, told, _reason(folder)),
        _results(result),
        _controls(result.get("controls") or {}),
        _data(recipe, result),
        _block("Method", "yaml", {"method": settings["method"]}),
        _block("Recipe", "yaml", recipe, AGAIN.format(repo)),
    ]
    front = {
        "library_name": "innerloop",
        "pipeline_tag": "text-generation",
        "tags": [*TAGS, name, *(["custom_generate"] if told else [])],
        **_sources(recipe),
        **_index(repo, result),
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _about(name: str) -> str:
    try:
        method = method_named(name)
    except InputError:  # a class of one's own that cannot be imported here
        return f"A language model that reasons by `{name}`, trained with innerloop."
    link = method.paper.replace("arXiv ", "https://arxiv.org/abs/") if method.paper.startswith("arXiv") else ""
    paper = f" ([{method.paper}]({link}))" if link else ""
    own = f" Its class is `{name}`, which must be importable where the model is loaded." if "." in name else ""
    return f"A language model that reasons by `{method.name}`{paper}: {method.summary}.{own}"


def _loading(repo: str, told: Mapping[str, Any] | None, reason: str) -> str:
    own = f'import innerloop as il\n\nmodel = il.LatentModel.from_pretrained("{repo}")\n'
    own += "print(model.generate([question])[0].text)"
    text = f"## How to load\n\n```python\n{own}\n```\n\n"
    if told is None:
        return text + f"{reason}."
    asked = f"tokenizer([question + {told['question_end']!r}], return_tensors='pt')"
    if told["chat"]:
        turn = "[{'role': 'user', 'content': question}]"
        asked = (
            f"tokenizer.apply_chat_template({turn}, add_generation_prompt=True, return_dict=True, return_tensors='pt')"
        )
    plain = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer, lm = (kind.from_pretrained("{repo}") for kind in (AutoTokenizer, AutoModelForCausalLM))\n'
        f"inputs = {asked}\n"
        f'out = lm.generate(**inputs, max_new_tokens=64, custom_generate="{repo}", trust_remote_code=True)\n'
        "print(tokenizer.decode(out[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True))"
    )
    why = "Plain `transformers` answers with the thought by `custom_generate/generate.py`"
    return text + f"{why}, which you may read first:\n\n```python\n{plain}\n```"


def _reason(folder: Path) -> str:
    config = folder / "generation_config.json"
    told = json.loads(config.read_text()).get("innerloop") if config.exists() else None
    return str(told or "Plain transformers answers without the thought")


def _results(result: Mapping[str, Any]) -> str:
    if not result:
        return "## Accuracy\n\nNot measured yet (`innerloop eval`)."
    (low, high), cost = result["ci95"], result.get("cost", {})
    if "accuracy" in result:
        title, what = "Accuracy", "questions"
        number = f"**{result['accuracy']:.1%}** (95 % interval {low:.1%} to {high:.1%})"
    else:  # of running text
        title, what = "Perplexity", "chunks"
        number = f"**{result['perplexity']:,.4g}** (95 % interval {math.exp(low):,.4g} to {math.exp(high):,.4g})"
    costs = [f"| {words} | {cost[key]:,.4g} |" for key, words in COSTS.items() if key in cost]
    lines = [
        f"## {title}\n",
        f"{number} of {result['n']} {result['split']} {what} of `{result['task']['name']}`, seed {result['seed']}.\n",
        *(["| cost of an answer | mean |", "|---|---|", *costs, ""] if costs else []),
        f"Measured on {result['device']} with {', '.join(map(' '.join, result['versions'].items()))}.",
    ]
    return "\n".join(lines)


def _controls(found: Mapping[str, Any]) -> str:
    if not found:
        return "## Controls\n\nWhether the answers come from the thought has not been measured (`--controls true`)."
    lines = [
        f"| {one['title']} | {one['accuracy']:.1%} | {100 * one['difference']:+.1f} |" for one in found["controls"]
    ]
    table = ["", "| with latents | accuracy | points |", "|---|---|---|", *lines] if lines else []
    return "\n".join(["## Controls\n", found["verdict"]["sentence"], *table])


def _data(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    task = recipe.get("task") or result.get("task")
    return _block("Data", "yaml", {"task": task}) if task else ""


def _block(title: str, language: str, content: Mapping[str, Any], before: str = "") -> str:
    if not content:
        return ""
    shown = yaml.safe_dump(_without_empty(without_machine(content)), sort_keys=False)
    return f"## {title}\n\n{before}```{language}\n{shown}```"


def _without_empty(value: Any) -> Any:
    """Return settings without what is empty."""
    if isinstance(value, Mapping):
        return {key: _without_empty(one) for key, one in value.items() if one not in (None, {}, [])}
    return [_without_empty(one) for one in value] if isinstance(value, list) else value


def _sources(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Hub's names of what the model was made from."""
    task, backbone = recipe.get("task") or {}, recipe.get("backbone") or {}
    data = str(task.get("train")).partition(":")[0] if isinstance(task, Mapping) else ""
    names: dict[str, list[Any]] = {"base_model": [backbone.get("model")], "datasets": [data]}
    found = {key: [name for name in named if _is_hub_name(name)] for key, named in names.items()}
    return {key: named[0] if key == "base_model" else named for key, named in found.items() if named}


def _is_hub_name(name: Any) -> bool:
    """Tell whether a name is one of the Hub's, and no file or folder."""
    parts = Path(str(name)).parts
    return len(parts) == 2 and not Path(str(name)).is_absolute() and not Path(name).suffix and not Path(name).exists()


def _index(repo: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy, or the perplexity, as the Hub lists it."""
    if not result:
        return {}
    name, metric = result["task"]["name"], {"type": "perplexity", "value": result.get("perplexity")}
    if "accuracy" in result:
        metric = {"type": "accuracy", "value": round(100 * result["accuracy"], 2)}
    told = {"task": {"type": "text-generation"}, "dataset": {"name": name, "type": name, "split": result["split"]}}
    return {"model-index": [{"name": repo.rpartition("/")[2], "results": [{**told, "metrics": [metric]}]}]}


def measured(run: Path) -> dict[str, Any]:
    """Return what was measured of a run, if it was of the weights that lie there."""
    try:
        found = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("saved") == identity(run) else {}
