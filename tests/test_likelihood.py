"""Pre-training on running text: every token is learned, whatever is thought in between; how well it is predicted."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from innerloop import Cot, InputError, LatentModel, LatentTrainer, LatentTrainingArguments, Looped, NoCot, Pause, Slr
from innerloop.cli.main import main
from innerloop.measure import evaluate
from innerloop.measure.likelihood import Likelihood, likelihood
from innerloop.methods import Method
from innerloop.tasks import Text
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import Row
from tests.fields import FullLoop
from tests.methods.tools import assert_close, change, stir
from tests.models import tiny_model

CHUNKS = (
    Example("3 + 4 = 2", (), " 2 * 2 = 4"),
    Example("4 - 3", (), " = 1"),
    Example("1 ; + 1 ; + 2", (), " ; - 4 ;"),
)
TEXT = Text(train="-")


def reader(method: Method) -> LatentModel:
    """A model that reads running text."""
    model = tiny_model(method, "gpt2", num_hidden_layers=2)
    stir(model)
    model.encoder = PromptEncoder(model.tokenizer, running_text=True)
    return model.eval()


def test_plain_pre_training_is_that_of_the_bare_model():
    model = reader(NoCot())
    total, n = 0.0, 0
    for chunk in CHUNKS:
        ids = torch.tensor([model.tokenizer.encode(chunk.question + chunk.answer)])
        total += model.backbone.lm(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        n += ids.shape[1] - 1
    assert model.loss(CHUNKS).loss.item() == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        *({}, {"answer_from": "kv_last"}, {"loop_scope": "last"}, {"loop_scope": "append"}),
        {"loop_scope": "append", "answer_from": "kv_last"},
        {"prefix_kv": "per_iter", "loop": FullLoop(lora="per_iter", site="pre_norm")},
    ],
    ids=str,
)
def test_with_a_loop_the_beginning_is_read_plainly_and_the_rest_after_the_thought(fields):
    model = reader(Slr(n_slots=3, max_loops=2, **fields))
    every = model.rows(CHUNKS)
    after, ends = model.row_logits(every), model.row_logits([_of_answer(row) for row in every])
    for chunk, row, whole, end in zip(CHUNKS, every, after, ends):
        asked = torch.tensor([model.tokenizer.encode(chunk.question)])
        begins = model.backbone.lm(input_ids=asked).logits[0, :-1]
        assert_close(whole, torch.cat([begins, end]), 1e-4)
        assert_close(model.row_logits([row])[0], whole, 1e-4)


def _of_answer(row: Row) -> Row:
    prefix = [dataclasses.replace(span, supervised=False) for span in row.prefix]
    return dataclasses.replace(row, prefix=prefix)


@pytest.mark.parametrize("method", [NoCot(), Slr(n_slots=3, max_loops=2, loop_scope="all"), Looped(max_loops=2)])
def test_the_likelihood_is_that_of_what_the_text_goes_on_with(method):
    model = reader(method)
    model.encoder = PromptEncoder(model.tokenizer)  # whatever else the model reads
    found = likelihood(model, CHUNKS, batch_size=2)
    expected = []
    for chunk in CHUNKS:
        row = method.rows([chunk], PromptEncoder(model.tokenizer, running_text=True))[0]
        target = torch.tensor(row.spans[-1].ids)
        expected.append(cross_entropy(model.row_logits([row])[0][-len(target) :], target, reduction="sum").item())
        assert found.n_tokens[len(expected) - 1] == len(target)
    assert list(found.losses) == pytest.approx(expected, rel=1e-5)
    assert found.nll == pytest.approx(sum(expected) / sum(found.n_tokens)) and found.n_unknown == 0


def test_other_numbers_of_loops_unknown_words_and_long_chunks():
    model = reader(Slr(n_slots=3, max_loops=2))
    twin = LatentModel(model.backbone, model.tokenizer, change(model.method, max_loops=0)).eval()
    assert likelihood(model, CHUNKS, loops=0).nll == pytest.approx(likelihood(twin, CHUNKS).nll, rel=1e-5)
    strange = Example("1 + 2", (), " = unheard 3")
    assert likelihood(model, [strange]).n_unknown == 1
    long = Example("1 " * 300, (), " + 2")
    assert likelihood(model, [long, strange]).n_left_out == 1
    with pytest.raises(InputError, match=r"lower task\.n_words"):
        likelihood(model, [long])
    with pytest.raises(InputError, match="no chunk of text"):
        likelihood(model, [])
    with pytest.raises(InputError, match="batch_size is 0"):
        likelihood(model, CHUNKS, batch_size=0)
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(InputError, match=r"the text's loss is nan nats a token.*diverged"):
        likelihood(model, CHUNKS)
    found = Likelihood((2.0, 6.0), (2, 2))
    assert found.nll == 2.0 and found.interval == pytest.approx((2.0 - 1.96, 2.0 + 1.96), abs=1e-3)


@pytest.mark.parametrize(
    ("method", "valid", "words"),
    [
        (NoCot(), CHUNKS, "set train.eval_strategy to no"),
        (Slr(decoder={"kind": "separate"}), None, "set decoder.kind to lm_head"),
        (Slr(loop_scope="all", answer_from="kv_last"), None, "set answer_from to refeed"),
        (Cot(), None, "no training example has steps"),
    ],
)
def test_what_cannot_learn_from_text_is_refused(method, valid, words, tmp_path: Path):
    args = LatentTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    with pytest.raises(InputError, match=words):
        LatentTrainer(tiny_model(method), args, CHUNKS, valid, task=TEXT)
    with pytest.raises(InputError, match="no right answers"):
        evaluate(reader(Pause()), TEXT, CHUNKS)


def test_text_then_chains_with_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = "the loop reads a text and goes on with it, word by word. "
    (tmp_path / "text.txt").write_text(words * 12)
    scratch = {"type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    slr = {"name": "slr", "n_slots": 2, "max_loops": 2}
    raw = {
        "task": {"name": "text", "train": str(tmp_path / "text.txt"), "n_words": 12, "n_continued": 4},
        "backbone": {"scratch": {**scratch, "num_attention_heads": 2, "max_position_embeddings": 64}},
        "train": {"max_steps": 2, "batch_size": 4, "use_cpu": True, "save_strategy": "no"},
        "stages": [
            {"method": {**slr, "loop_sampling": "uniform"}},
            {"task": {"name": "chain", "n_ops": 2, "n_train": 16, "n_test": 4}, "method": slr},
        ],
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    known = LatentModel.from_pretrained(tmp_path / "run").tokenizer.get_vocab()
    assert {" loop", " +", " 3", " ;"} <= known.keys()
    pretrained = str(tmp_path / "run" / "stages" / "1")
    task = yaml.safe_dump(raw["task"], default_flow_style=True, width=1000)
    assert main(["eval", pretrained, "--task", task, "--split", "train"]) == 0
    result = yaml.safe_load((tmp_path / "run" / "stages" / "1" / "result.json").read_text())
    assert result["n"] == 13 and result["perplexity"] == pytest.approx(math.exp(result["nll"]))
    assert result["ci95"][0] < result["nll"] < result["ci95"][1] and "accuracy" not in result
    asked, generate = [], LatentModel.generate
    monkeypatch.setattr(LatentModel, "generate", lambda model, *a, **k: asked.append(model) or generate(model, *a, **k))
    for run in (pretrained, str(tmp_path / "run")):
        assert main(["ask", run, "the loop reads", "--max_new_tokens", "2"]) == 0
    assert [model.encoder.running_text for model in asked] == [True, False]  # a text goes on, a question is answered
    assert main(["lens", pretrained, "--examples", "1", "--task", task, "--split", "train"]) == 0
    assert asked[-1].encoder.running_text
