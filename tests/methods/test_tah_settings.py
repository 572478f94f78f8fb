"""Think-at-Hard's settings: every field does what it says, and what cannot be is refused in one sentence."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from innerloop import Cot, InputError, LatentModel, Tah, write_examples
from innerloop.decoder.backbone import Backbone
from innerloop.methods.depth.decider import Decider, usual_layers
from innerloop.methods.depth.prune import loss_without, prune_layers
from innerloop.train.recipe import parse_recipe
from tests.fields import make
from tests.methods.tools import MIXED, by_arch
from tests.models import chain_examples, saved, tiny_backbone, tiny_model

SMALL = {"lora.rank": 2, "decider.width": 8, "decider.blocks": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_loops": 0}, "max_loops and lora_rank must be at least 1"),
        ({"lora.rank": 0}, "max_loops and lora_rank must be at least 1"),
        ({"iterate": "sometimes"}, "iterate is 'sometimes'.*choose one of decider, oracle, always, never"),
        ({"trains": "decide"}, "trains is 'decide' .did you mean 'decider'"),
        ({"depth_attention": "dua"}, "depth_attention is 'dua' .did you mean 'duo'"),
        ({"lora.kind": "per_layer"}, "lora is 'per_layer'"),
        ({"oracle.metric": "kl", "iterate": "oracle", "oracle.reference": "x"}, "label_metric is 'kl'"),
        ({"tau": -0.1}, "tau is a probability: choose a value from 0 on"),
        ({"lora.dropout": 1.0}, "lora_dropout is a probability below 1"),
        ({"decider.dropout": -0.1}, "decider_dropout is a probability below 1"),
        ({"input_mix_topk": 0}, "input_mix_topk, decider_topk and decider_width must be at least 1"),
        ({"decider_topk": 0}, "input_mix_topk, decider_topk and decider_width must be at least 1"),
        ({"decider.blocks": -1}, "decider_blocks cannot be negative"),
        ({"pos_weight": 0.0}, "pos_weight must be above 0"),
        ({"oracle.share": 1.0}, "label_share is a share of the tokens"),
        ({"oracle.share": 0.3, "iterate": "oracle", "oracle.reference": "x"}, "mismatch has a share of its own"),
        (
            {"trains": "decider", "iterate": "oracle", "oracle.reference": "x"},
            "set iterate to decider and max_loops to at least 2",
        ),
        (
            {"trains": "decider", "max_loops": 1, "oracle.reference": "x"},
            "set iterate to decider and max_loops to at least 2",
        ),
        ({"trains": "decider"}, "set reference to the folder of a run, or to a model"),
        ({"iterate": "oracle"}, "set reference to the folder of a run, or to a model"),
        ({"oracle.reference": "x"}, "set iterate to oracle or trains to decider, or drop them"),
        ({"oracle.cache": "x"}, "set iterate to oracle or trains to decider, or drop them"),
        ({"prune_layers": -1}, "prune_layers cannot be negative"),
        ({"prune_layers": 1}, "set both prune_layers and prune_rows, or neither"),
        ({"prune_rows": "x.jsonl"}, "set both prune_layers and prune_rows, or neither"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        make(Tah, **fields)
    assert "\n" not in str(caught.value)


def test_what_the_model_cannot_is_refused_in_one_sentence():
    with pytest.raises(InputError, match=r"states after layers 0 .the embeddings. to 2 of this model"):
        tiny_model(Tah(decider={"layers": (1, 3)}), "llama")
    with pytest.raises(InputError, match="its logits do not add up: set residual_logits to false"):
        tiny_model(make(Tah, **SMALL), "gemma2")
    backbone = tiny_backbone("llama")
    head = backbone.lm.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]))
    with pytest.raises(InputError, match="or has a bias"):
        LatentModel(backbone, tiny_model(Cot()).tokenizer, make(Tah, **SMALL))
    LatentModel(backbone, tiny_model(Cot()).tokenizer, make(Tah, residual_logits=False, **SMALL))


def test_a_recipe_gives_lists_and_gets_the_dataclass():
    raw = {"name": "tah", "decider.layers": [0, 1], "lora_targets": ["q_proj"], "iterate": "never", "tau": 1}
    method = parse_recipe(
        {"task": "chain", "backbone": {"scratch": {"type": "llama"}}, "method": raw, "out": "runs/x"}
    ).method
    assert method == Tah(decider={"layers": (0, 1)}, iterate="never", tau=1.0)


def test_the_paths_of_a_recipe_are_of_its_run():
    raw = {"name": "tah", "iterate": "oracle", "oracle.reference": "{out}/stages/1", "oracle.cache": "{out}/labels"}
    recipe = parse_recipe({"task": "chain", "backbone": {"model": "x"}, "method": raw, "out": "runs/x"}).with_paths()
    assert (recipe.method.reference, recipe.method.label_cache) == ("runs/x/stages/1", "runs/x/labels")


def test_the_usual_layers_are_the_cards():
    assert usual_layers(28) == (0, 7, 13, 20, 26)
    assert [usual_layers(n) for n in (1, 2, 3, 4)] == [(0,), (0, 1), (0, 1), (0, 1, 2)]
    assert tiny_model(make(Tah, **SMALL), num_hidden_layers=1).depth.chooser.layers == (0,)


def test_the_decider_is_the_cards_network():
    torch.manual_seed(0)
    decider = Decider(width=8, n_states=3, n_logits=5, hidden=6, n_blocks=4, dropout=0.25)
    shapes = [tuple(m.weight.shape) for m in decider.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(8, 5), (6, 32), (6, 6), *[(24, 6), (6, 24)] * 4, (1, 6)]
    assert decider.flops == 2 * sum(a * b for a, b in shapes)
    assert {m.p for m in decider.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert all(m.bias.abs().max() == 0 for m in decider.modules() if isinstance(m, nn.Linear))
    states, top = [torch.randn(7, 8) for _ in range(3)], torch.randn(7, 5)
    decider.eval()
    x = decider.mix(decider.enter(torch.cat([*states, decider.of_logits(top)], dim=1)))
    for block in decider.blocks:
        norm, rise, fall = block[0], block[1], block[4]
        x = x + fall(torch.nn.functional.gelu(rise(norm(x))))
    assert torch.equal(decider(states, top), decider.leave(decider.norm(x))[:, 0])
    decider.train()
    assert not torch.equal(decider(states, top), decider(states, top))
    narrow = Decider(width=8, n_states=3, n_logits=5, hidden=6, n_blocks=0, dropout=0.25)
    assert len(narrow.blocks) == 0 and narrow(states, top).shape == (7,)


def test_the_decider_has_the_sizes_that_were_asked_for():
    fields = {
        "decider.layers": (2, 0),
        "decider_topk": 4,
        "decider.width": 12,
        "decider.blocks": 3,
        "decider.dropout": 0.3,
    }
    decider = tiny_model(make(Tah, **{"lora.rank": 2}, **fields)).depth.chooser.decider
    assert (decider.of_logits.in_features, decider.enter.in_features) == (4, 3 * 32)
    assert (decider.enter.out_features, len(decider.blocks)) == (12, 3)
    assert decider.blocks[0][3].p == 0.3
    assert tiny_model(Tah(lora={"rank": 2}, iterate="always")).depth.chooser.decider is None


@pytest.mark.parametrize(("lora", "n_banks"), [("shared", 1), ("per_iter", 2)])
def test_lora_is_shared_or_one_for_each_reading_after_the_first(lora, n_banks):
    model = tiny_model(Tah(iterate="always", max_loops=3, lora={"kind": lora, "rank": 3, "gamma": 6.0}))
    bank = model.loop.lora
    assert len(bank.modules_by_name) == 3 and bank.scale == 2.0
    assert {tuple(down.shape) for down in bank.down.values()} == {(n_banks, 3, 32)}
    assert tiny_model(Tah(iterate="always", lora={"kind": "none"})).loop.lora is None


# Fewer layers


def with_an_idle_layer(arch: str, idle: int) -> Backbone:
    """Return a backbone of four layers, one of which adds nothing to the states."""
    backbone = tiny_backbone(arch, num_hidden_layers=4)
    with torch.no_grad():
        for name, parameter in backbone.layers[idle].named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    return backbone


def own_text(backbone: Backbone) -> list[list[int]]:
    """Return rows that a model writes itself, which no other model knows as well."""
    start = torch.randint(3, 60, (4, 2))
    return backbone.lm.generate(start, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist()


@by_arch
def test_the_loss_without_a_layer_is_that_of_the_model_without_it(arch):
    backbone = tiny_backbone(arch, num_hidden_layers=4)
    row = torch.randint(3, 60, (12,))
    for gone in range(4):
        twin, kept = copy.deepcopy(backbone), [i for i in range(4) if i != gone]
        twin.replace_layers([twin.layers[i] for i in kept], kept)
        with torch.no_grad():
            loss = twin.lm(input_ids=row[None], labels=row[None]).loss.item()
        assert loss_without(backbone, [row.tolist()], gone) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("idle", [1, 3])
@by_arch
def test_the_layer_that_is_missed_least_is_deleted(arch, idle):
    backbone = with_an_idle_layer(arch, idle)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        before = backbone.head(backbone(backbone.embed(ids)))
        cached = backbone.lm.generate(ids, max_new_tokens=4, do_sample=False)
    assert prune_layers(backbone, own_text(backbone), 1) == [idle]
    assert backbone.n_layers == backbone.config.num_hidden_layers == 3
    with torch.no_grad():
        assert torch.equal(backbone.head(backbone(backbone.embed(ids))), before)
        assert torch.equal(backbone.lm.generate(ids, max_new_tokens=4, do_sample=False), cached)


def test_deleting_more_layers_tells_them_by_their_first_numbers():
    backbone = with_an_idle_layer("llama", 1)
    gone = prune_layers(backbone, own_text(backbone), 2)
    assert gone[0] == 1 and gone[1] in (0, 2, 3) and backbone.n_layers == 2
    with pytest.raises(InputError, match="the model has 2 layers, which leaves none: lower prune_layers"):
        prune_layers(backbone, [[1, 2, 3]], 2)
    with pytest.raises(InputError, match="give at least one of two tokens"):
        prune_layers(backbone, [[1]], 1)


def test_a_model_from_scratch_is_not_pruned():
    with pytest.raises(InputError, match="from scratch has no layers to delete"):
        tiny_model(make(Tah, prune_rows="rows.jsonl", **SMALL))


@by_arch
def test_a_pretrained_model_is_pruned_once_when_the_method_is_put_on_it(arch, tmp_path: Path):
    plain = tiny_model(Cot(), arch, num_hidden_layers=4)
    rows = tmp_path / "rows.jsonl"
    write_examples(chain_examples(8), rows)
    method = make(Tah, iterate="always", prune_rows=str(rows), **SMALL)
    model = LatentModel.from_pretrained(saved(plain, tmp_path / "plain"), method)
    assert model.backbone.n_layers == 3
    again = LatentModel.from_pretrained(saved(model, tmp_path / "tah"))
    assert again.backbone.n_layers == 3 and again.method == method
    for ours, theirs in zip(again.answer_logits(MIXED), model.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)
