import math
import re
from collections import Counter, defaultdict
from itertools import pairwise
from statistics import mean, stdev

import pytest
from scipy.stats import chi2_contingency

from innerloop.errors import InputError
from innerloop.tasks import ProsQA
from innerloop.tasks.prosqa import CONCEPTS, PEOPLE, generate
from innerloop.text.examples import Example, write_examples

WORDS = {"Every", "is", "a", "Is", "or", *PEOPLE, *CONCEPTS}


def distances_from(start, children):
    """Return the distance of every node that can be reached, breadth first."""
    found, edge = {start: 0}, {start}
    while edge:
        edge = {child for node in edge for child in children[node]} - found.keys()
        found |= dict.fromkeys(edge, max(found.values()) + 1)
    return found


def paths(node, target, children, hops):
    """All paths of that many edges, by trying every one."""
    if hops == 0:
        return [[node]] if node == target else []
    return [[node, *rest] for child in children[node] for rest in paths(child, target, children, hops - 1)]


def graph_of(example):
    n_nodes = len(example.meta["idx_to_symbol"])
    children, parents = ({node: [] for node in range(n_nodes)} for _ in range(2))
    for parent, child in example.meta["edges"]:
        children[parent].append(child)
        parents[child].append(parent)
    return n_nodes, children, parents


def measure(example):
    """Return statistics of one example: numbers, and lists of counted things."""
    n_nodes, children, parents = graph_of(example)
    root, target, distractor = (example.meta[key] for key in ("root", "target", "neg_target"))
    people = {node for node in range(n_nodes) if not parents[node]}
    concepts = set(range(n_nodes)) - people
    reach = [distances_from(person, children) for person in (0, 1)]
    below = [set(reach[person]) - {person} for person in (0, 1)]
    leaves = {node for node in range(n_nodes) if not children[node]}
    hops = reach[root][target]
    numbers = {
        "nodes (symbols)": n_nodes,
        "edges = statements": len(example.meta["edges"]),
        "words in the question": len(example.question.split()),
        "characters in the question": len(example.question),
        "concepts": len(concepts),
        "leaves": len(leaves),
        "descendants of node 0 only": len(below[0] - below[1]),
        "descendants of node 1 only": len(below[1] - below[0]),
        "descendants of both": len(below[0] & below[1]),
        "nodes below neither (extra people included)": len(set(range(2, n_nodes)) - below[0] - below[1]),
        "leaves below the root only": len(leaves & below[root] - below[1 - root]),
    }
    counted = {
        "hops = steps": [len(example.steps)],
        "named people": [len(people)],
        "out-degree of nodes 0 and 1 (7 = 7+)": [min(len(children[node]), 7) for node in (0, 1)],
        "out-degree of the other people (7 = 7+)": [min(len(children[node]), 7) for node in people - {0, 1}],
        "out-degree of concepts (7 = 7+)": [min(len(children[node]), 7) for node in concepts],
        "in-degree of concepts (6 = 6+)": [min(len(parents[node]), 6) for node in concepts],
        "shortest root-target paths (5 = 5+)": [min(len(paths(root, target, children, hops)), 5)],
        "distance other root - distractor": [reach[1 - root][distractor]],
        "root is node 0 / 1": [root],
        "target named first": [f" {example.meta['idx_to_symbol'][target]} or " in example.question],
    }
    return numbers, counted


def statistics(examples):
    """Return a list of values per numeric statistic, and a Counter per counted one."""
    numbers, counted = defaultdict(list), defaultdict(Counter)
    for of_numbers, of_counted in map(measure, examples):
        for name, value in of_numbers.items():
            numbers[name].append(value)
        for name, values in of_counted.items():
            counted[name].update(values)
    return numbers, counted


def check_structure(example):
    """Assert what holds of every example."""
    n_nodes, children, parents = graph_of(example)
    names, edges = example.meta["idx_to_symbol"], example.meta["edges"]
    root, target, distractor = (example.meta[key] for key in ("root", "target", "neg_target"))
    assert len(set(names)) == n_nodes
    assert all((name in PEOPLE) == (not parents[node]) for node, name in enumerate(names))
    assert all((name in CONCEPTS) == bool(parents[node]) for node, name in enumerate(names))
    assert not parents[0] and not parents[1] and root in (0, 1)
    assert all(parent < child for parent, child in edges)
    assert [child for _, child in edges] == sorted(child for _, child in edges)
    assert all(parents[node] or children[node] for node in range(n_nodes))

    statements = [f"{'Every ' if parents[p] else ''}{names[p]} is a {names[c]}." for p, c in edges]
    told = re.findall(r"[^.?]+[.?]", example.question)
    assert sorted(s.strip() for s in told[:-1]) == sorted(statements) and len(set(statements)) == len(edges)
    a, b = names[target], names[distractor]
    assert told[-1].strip() in (f"Is {names[root]} a {a} or {b}?", f"Is {names[root]} a {b} or {a}?")
    assert set(re.sub(r"[.?]", "", example.question).split()) <= WORDS

    below, other = distances_from(root, children), distances_from(1 - root, children)
    assert not children[target] and not children[distractor]
    assert target in below and target not in other
    assert distractor in other and distractor not in below
    assert 3 <= below[target] == len(example.steps) <= 6
    shortest = paths(root, target, children, below[target])
    told_steps = [[statements[edges.index([p, c])] for p, c in pairwise(path)] for path in shortest]
    assert list(example.steps) in told_steps
    assert example.answer == f"{names[root]} is a {names[target]}."
    assert below[target] >= max(at for node, at in below.items() if not children[node] and node not in other)


@pytest.fixture(scope="module")
def generated():
    return generate(2000, seed=0)


@pytest.fixture(scope="module")
def published(shared_data):
    return ProsQA(valid=str(shared_data / "prosqa" / "valid.jsonl")).examples("valid")


def test_generated_and_published_statistics_agree(generated, published):
    (numbers, counted), (real_numbers, real_counted) = statistics(generated), statistics(published)
    for name, values in numbers.items():
        real = real_numbers[name]
        error = math.hypot(stdev(values) / math.sqrt(len(values)), stdev(real) / math.sqrt(len(real)))
        assert abs(mean(values) - mean(real)) < 3 * error, name
        assert stdev(values) == pytest.approx(stdev(real), rel=0.2), name
    for name, counts in counted.items():  # rare values join their neighbour, as chi-square wants 5 of each expected
        table, share = [[0, 0]], real_counted[name].total() / (real_counted[name].total() + counts.total())
        for value in sorted(counts | real_counted[name]):
            table[-1][0] += counts[value]
            table[-1][1] += real_counted[name][value]
            if sum(table[-1]) * share >= 5:
                table.append([0, 0])
        last = table.pop()
        table[-1] = [a + b for a, b in zip(table[-1], last)]
        assert len(table) >= 2 and chi2_contingency(table).pvalue > 0.0027, name  # that is 3 standard errors


@pytest.mark.parametrize("which", ["generated", "published"])
def test_structure_of_every_example(which, request):
    for example in request.getfixturevalue(which):
        check_structure(example)


def test_shortest_paths_are_drawn_evenly(generated):
    firsts = Counter()
    for example in generated:
        _, children, _ = graph_of(example)
        options = paths(example.meta["root"], example.meta["target"], children, len(example.steps))
        if len(options) == 2:
            names = example.meta["idx_to_symbol"]
            ends = sorted([names[node] for node in path] for path in options)
            told = [re.findall(r"\w+", step)[-1] for step in example.steps]
            firsts[ends[0][1:] == told] += 1
    assert abs(firsts[True] - firsts[False]) < 3 * math.sqrt(firsts.total())


def test_seeds_limits_and_splits(generated):
    assert generate(20, seed=0) == generated[:20]
    assert ProsQA().examples("train", limit=20) == generated[:20]
    other = ProsQA(seed=1).examples("train", limit=20)
    assert not {e.question for e in other} & {e.question for e in generated}
    task = ProsQA(n_valid=60, n_test=50)
    valid, test = task.examples("valid"), task.examples("test")
    assert (len(valid), len(test)) == (60, 50)
    questions = [{" ".join(sorted(e.question.split())) for e in examples} for examples in (generated, valid, test)]
    assert sum(map(len, questions)) == len(set().union(*questions)) == 2110  # not even the same statements reordered


def test_nothing_is_generated_beside_a_train_file(tmp_path):
    write_examples([Example("q", (), "Tom is a lempus.")], tmp_path / "train.jsonl")
    task = ProsQA(train=str(tmp_path / "train.jsonl"))
    assert len(task.examples("train")) == 1
    with pytest.raises(InputError, match=r"'prosqa' has no test split: give task\.test=FILE"):
        task.examples("test")
    with pytest.raises(InputError, match="n_test is 0"):
        ProsQA(n_test=0)


def test_coconut_file_is_read(fixtures):
    (example,) = ProsQA(test=str(fixtures / "prosqa_coconut.json")).examples("test")
    check_structure(example)
    assert example.steps == ("Tom is a terpus.", "Every terpus is a brimpus.", "Every brimpus is a lempus.")
    assert example.id == "prosqa_coconut-1"


def test_answer_check_reads_the_last_word():
    task = ProsQA()
    predicted = task.extract("Tom is a terpus.\n### Tom is a Lempus\nBob")
    assert predicted == "Tom is a Lempus"
    assert task.is_correct(predicted, "Tom is a lempus.")
    assert task.is_correct("lempus", "Tom is a lempus.")
    assert not task.is_correct("Tom is a terpus.", "Tom is a lempus.")
    assert not task.is_correct(".", "Tom is a lempus.")
