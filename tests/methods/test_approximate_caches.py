"""Approximate caches (fast_denoising.md): what is exact of them, what they read, and that nothing else changes."""

import pytest
import yaml

from innerloop import BlockDiffusion, Dream, InputError, Llada
from innerloop.cli.main import main
from innerloop.measure.agreement import agreement
from tests.fields import change
from tests.methods.test_denoise_sampling import QUESTIONS, G, model_of
from tests.models import ARCHS, SETTINGS, tiny_model

K = 4
CACHES = ("prompt", "block", "dual", "delayed")
by_cache = pytest.mark.parametrize("cache", CACHES)
METHODS = {
    "llada": Llada(gen_length=G, sampler={"block_length": K}),
    "llada, two passes a block": Llada(gen_length=G, sampler={"block_length": K, "steps": 6, "eos": "last"}),
    "llada, one block": Llada(gen_length=G, sampler={"steps": 5}),
    "threshold": Llada(gen_length=G, sampler={"block_length": K, "commit": "threshold", "threshold": 0.4}),
    "guidance": Llada(gen_length=G, sampler={"block_length": K, "guidance": 1.0}),
    "remdm": Llada(gen_length=G, sampler={"block_length": K, "commit": "remdm", "steps": 12, "remask": {"cap": 0.3}}),
    "random tokens": Llada(gen_length=G, noise={"filler": "random"}, sampler={"block_length": K}),
    "dream": Dream(gen_length=G, sampler={"block_length": K, "commit": "entropy"}),
    "dream, origin": Dream(gen_length=G, sampler={"block_length": K}),
}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def with_cache(method, cache, refresh=None):
    return change(method, **{"sampler.cache": cache, "sampler.refresh": refresh})


def answers(model, method, **options):
    model.method = method
    found = model.generate(QUESTIONS, **{"batch_size": 3, "seed": 5, **options})
    return [(one.ids, one.cost.passes) for one in found], [one.cost.positions for one in found]


@by_cache
@by_method
def test_read_anew_in_every_pass_it_is_none(cache, method):
    """Tests of the card: dual with refresh = 1 is none; so are the others."""
    model = model_of(method, "gpt2" if method.shift else "llama")
    assert answers(model, with_cache(method, cache, 1), temperature=1.0) == answers(model, method, temperature=1.0)


@by_cache
@by_method
def test_where_keys_depend_on_their_own_token_alone_it_is_exact(cache, method):
    """In a decoder of one layer what is kept is what would be read again, so only positions are spared."""
    model = model_of(method, "gpt2" if method.shift else "llama", num_hidden_layers=1)
    expected, plain = answers(model, method, temperature=1.0)
    found, positions = answers(model, with_cache(method, cache, 3 if cache == "delayed" else None), temperature=1.0)
    assert found == expected
    assert all(n <= most for n, most in zip(positions, plain)) and sum(positions) < sum(plain)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_is_so_on_every_architecture(arch):
    method = METHODS["llada"]
    model = model_of(method, arch, num_hidden_layers=1, **({"layer_types": None} if "gemma" in arch else {}))
    expected, _ = answers(model, method)
    for cache in CACHES:
        assert answers(model, with_cache(method, cache))[0] == expected


@by_cache
@by_method
def test_answers_depend_on_no_company(cache, method):
    """Deeper, it is approximate; but the same in any batch, with canvases that join, leave and read everything anew."""
    model = model_of(method, "gpt2" if method.shift else "llama", initializer_range=0.5)
    method = with_cache(method, cache, 3 if cache == "delayed" else None)
    whole = answers(model, method, batch_size=5, temperature=1.0)
    assert answers(model, method, batch_size=1, temperature=1.0) == whole
    assert answers(model, method, batch_size=3, temperature=1.0) == whole


@by_cache
def test_deeper_it_is_approximate(cache):
    model = model_of(METHODS["llada"], initializer_range=0.5)
    exact, found = answers(model, METHODS["llada"]), answers(model, with_cache(METHODS["llada"], cache))
    assert exact[0] != found[0]


def test_agreement_is_the_share_of_tokens_that_are_the_same():
    method = METHODS["llada"]
    model = model_of(method, initializer_range=0.5)
    assert agreement(model, QUESTIONS) is None
    model.method = with_cache(method, "dual")
    written = [one.ids for one in model.generate(QUESTIONS)]
    share = agreement(model, QUESTIONS, batch_size=2)
    assert model.method == with_cache(method, "dual")
    model.method = method
    exact = [one.ids for one in model.generate(QUESTIONS)]
    n_same = sum(a == b for one, other in zip(written, exact) for a, b in zip(one, other))
    assert share == n_same / sum(max(map(len, pair)) for pair in zip(written, exact)) < 1
    model.method = with_cache(method, "dual", 1)
    assert agreement(model, QUESTIONS) == 1


def test_eval_tells_it(tmp_path, capsys):
    task = {"name": "chain", "n_ops": 3, "n_train": 8, "n_valid": 4, "n_test": 4}
    method = {"name": "llada", "gen_length": 24, "sampler": {"block_length": 6, "cache": "dual", "steps": 4}}
    recipe = {"task": task, "backbone": {"scratch": SETTINGS["llama"]}, "method": method, "out": str(tmp_path / "run")}
    recipe["train"] = {"max_steps": 1, "batch_size": 4, "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["train", str(tmp_path / "recipe.yaml")])
    main(["eval", str(tmp_path / "run"), "--batch_size", "2"])
    assert "of the tokens of the first 2 answers are those written without" in capsys.readouterr().out


@pytest.mark.parametrize(
    "cache, refresh, a_pass",
    [
        ("prompt", None, lambda n, k: n + G if k == 0 else G),
        ("prompt", 4, lambda n, k: n + G if k % 4 == 0 else G),
        ("block", None, lambda n, k: n + G if k % K == 0 else G - k // K * K),
        ("dual", None, lambda n, k: n + G if k % K == 0 else K),
        ("dual", 2, lambda n, k: n + G if k % 2 == 0 else K),
        ("delayed", None, lambda n, k: n + G if k == 0 else G - k + 1),
        ("delayed", 3, lambda n, k: n + G if k % 3 == 0 else G - k + 1),
    ],
)
def test_positions_are_as_many_as_each_cache_says(cache, refresh, a_pass):
    """One token a pass: pass k reads all, or what is not kept."""
    model = tiny_model(change(METHODS["llada"], **{"sampler.eos": "never"}))
    found, positions = answers(model, with_cache(model.method, cache, refresh))
    assert [passes for _, passes in found] == [G] * len(QUESTIONS)
    assert positions == [sum(a_pass(len(row), k) for k in range(G)) for row in model.prompts(QUESTIONS)]


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Llada(sampler={"refresh": 4}), "set sampler.cache, or leave refresh out"),
        (
            lambda: Llada(sampler={"cache": "full"}),
            "cache is full, but must be one of none, prompt, block, dual, delayed",
        ),
        (lambda: Dream(sampler={"cache": "dual", "refresh": 0}), "refresh is 0, but must be a whole number"),
        (
            lambda: Llada(soft={"share": 0.5}, sampler={"cache": "dual"}),
            "soft masks are fed anew in each pass",
        ),
        (lambda: BlockDiffusion(sampler={"cache": "dual"}), "finished blocks are cached exactly: leave it out"),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()
