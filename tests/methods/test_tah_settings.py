"""Think-at-Hard's settings: what its parts are, what a model cannot do, and one layer less."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from innerloop import Cot, InputError, LatentModel, Tah, write_examples
from innerloop.methods.depth.decider import Decider, usual_layers
from innerloop.methods.depth.prune import loss_without, prune_layer
from innerloop.train.recipe import parse_recipe
from tests.methods.tools import MIXED, by_arch, change
from tests.models import chain_examples, saved, tiny_backbone, tiny_model

SMALL = Tah(lora={"rank": 2}, decider={"width": 8, "blocks": 1})


def test_what_the_model_cannot_is_refused_in_one_sentence():
    with pytest.raises(InputError, match=r"states after layers 0 .the embeddings. to 2 of this model"):
        tiny_model(Tah(decider={"layers": (1, 3)}), "llama")
    with pytest.raises(InputError, match="from scratch has no layer to delete"):
        tiny_model(change(SMALL, prune_rows="rows.jsonl"))
    backbone, tokenizer = tiny_backbone("llama"), tiny_model(Cot()).tokenizer
    head = backbone.lm.get_output_embeddings()
    head.bias = nn.Parameter(torch.zeros(head.weight.shape[0]))
    with pytest.raises(InputError, match=r"or has a bias.*its logits do not add up: set residual_logits to false"):
        LatentModel(backbone, tokenizer, SMALL)
    LatentModel(backbone, tokenizer, change(SMALL, residual_logits=False))


def test_the_paths_of_a_recipe_are_of_its_run():
    oracle = {"reference": "{out}/stages/1", "cache": "{out}/labels"}
    raw = {"name": "tah", "iterate": "oracle", "oracle": oracle, "decider": {"layers": [0, 1]}}
    recipe = parse_recipe({"task": "chain", "backbone": {"model": "x"}, "method": raw, "out": "runs/x"}).with_paths()
    of_run = {"reference": "runs/x/stages/1", "cache": "runs/x/labels"}
    assert recipe.method == Tah(iterate="oracle", oracle=of_run, decider={"layers": (0, 1)})


def test_the_usual_layers_are_the_cards():
    assert usual_layers(28) == (0, 7, 13, 20, 26)
    assert [usual_layers(n) for n in (1, 2, 3, 4)] == [(0,), (0, 1), (0, 1), (0, 1, 2)]
    assert tiny_model(SMALL, num_hidden_layers=1).depth.chooser.layers == (0,)


def test_the_decider_is_the_cards_network():
    torch.manual_seed(0)
    decider = Decider(width=8, n_states=3, n_logits=5, hidden=6, n_blocks=4, dropout=0.25)
    linears = [m for m in decider.modules() if isinstance(m, nn.Linear)]
    shapes = [tuple(m.weight.shape) for m in linears]
    assert shapes == [(8, 5), (6, 32), (6, 6), *[(24, 6), (6, 24)] * 4, (1, 6)]
    assert decider.flops == 2 * sum(a * b for a, b in shapes)
    assert {m.p for m in decider.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert all(m.bias.abs().max() == 0 for m in linears)
    states, top = [torch.randn(7, 8) for _ in range(3)], torch.randn(7, 5)
    decider.eval()
    x = decider.mix(decider.enter(torch.cat([*states, decider.of_logits(top)], dim=1)))
    for norm, rise, _, _, fall, _ in decider.blocks:
        x = x + fall(nn.functional.gelu(rise(norm(x))))
    assert torch.equal(decider(states, top), decider.leave(decider.norm(x))[:, 0])
    decider.train()
    assert not torch.equal(decider(states, top), decider(states, top))
    narrow = Decider(width=8, n_states=3, n_logits=5, hidden=6, n_blocks=0, dropout=0.25)
    assert len(narrow.blocks) == 0 and narrow(states, top).shape == (7,)


def test_the_decider_has_the_sizes_that_were_asked_for():
    sizes = {"layers": (2, 0), "width": 12, "blocks": 3, "dropout": 0.3}
    decider = tiny_model(Tah(lora={"rank": 2}, input_mix_topk=4, decider=sizes)).depth.chooser.decider
    assert (decider.of_logits.in_features, decider.enter.in_features) == (4, 3 * 32)
    assert (decider.enter.out_features, len(decider.blocks), decider.blocks[0][3].p) == (12, 3, 0.3)
    assert tiny_model(change(SMALL, iterate="always")).depth.chooser.decider is None


@pytest.mark.parametrize(("kind", "n_banks"), [("shared", 1), ("per_iter", 2), ("none", 0)])
def test_lora_is_shared_or_one_for_each_reading_after_the_first(kind, n_banks):
    bank = tiny_model(Tah(iterate="always", max_loops=3, lora={"kind": kind, "rank": 3, "gamma": 6.0})).loop.lora
    assert (bank is None) == (kind == "none")
    if bank is not None:
        assert len(bank.modules_by_name) == 7 * 3 and bank.scale == 2.0
        assert {down.shape[:2] for down in bank.down.values()} == {(n_banks, 3)}


# One layer less


@by_arch
def test_the_loss_without_a_layer_is_that_of_the_model_without_it(arch):
    backbone, row = tiny_backbone(arch, num_hidden_layers=4), torch.randint(3, 60, (12,))
    for gone in range(4):
        twin, kept = copy.deepcopy(backbone), [i for i in range(4) if i != gone]
        twin.replace_layers([twin.layers[i] for i in kept], kept)
        with torch.no_grad():
            loss = twin.lm(input_ids=row[None], labels=row[None]).loss.item()
        assert loss_without(backbone, [row.tolist()], gone) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("idle", [1, 3])
@by_arch
@torch.no_grad()
def test_the_layer_that_is_missed_least_is_deleted(arch, idle):
    backbone = tiny_backbone(arch, num_hidden_layers=4)
    for name, parameter in backbone.layers[idle].named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj")):  # it adds nothing to the states
            parameter.zero_()

    def written(ids: torch.Tensor, n: int) -> torch.Tensor:
        return backbone.lm.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None)

    ids, known = torch.randint(3, 60, (2, 9)), written(torch.randint(3, 60, (4, 2)), 20)  # text that it knows best
    before, cached = backbone.head(backbone(backbone.embed(ids))), written(ids, 4)
    with pytest.raises(InputError, match="give at least one of two tokens"):
        prune_layer(backbone, [[1]])
    assert prune_layer(backbone, known.tolist()) == idle
    assert backbone.n_layers == backbone.config.num_hidden_layers == 3
    assert torch.equal(backbone.head(backbone(backbone.embed(ids))), before)
    assert torch.equal(written(ids, 4), cached)
    with pytest.raises(InputError, match="the model has one layer, which leaves none: leave prune_rows out"):
        prune_layer(tiny_backbone(arch, num_hidden_layers=1), known.tolist())


@by_arch
def test_a_pretrained_model_is_pruned_once_when_the_method_is_put_on_it(arch, tmp_path: Path):
    plain, rows = tiny_model(Cot(), arch, num_hidden_layers=4), tmp_path / "rows.jsonl"
    write_examples(chain_examples(8), rows)
    method = change(SMALL, iterate="always", prune_rows=str(rows))
    model = LatentModel.from_pretrained(saved(plain, tmp_path / "plain"), method)
    again = LatentModel.from_pretrained(saved(model, tmp_path / "tah"))
    assert again.backbone.n_layers == model.backbone.n_layers == 3 and again.method == method
    for ours, theirs in zip(again.answer_logits(MIXED), model.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)
