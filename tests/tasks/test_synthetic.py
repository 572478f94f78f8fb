from innerloop.tasks import Igsm, Mult4x4, Mult5x5, PHop


def number(digits):
    """Read digits written least significant first."""
    return int("".join(reversed(digits.split())))


def test_original_multiplication_line(fixtures):
    (example,) = Mult4x4(test=str(fixtures / "mult4x4.txt")).examples("test")
    a, b = example.question.split(" * ")
    assert number(a) * number(b) == number(example.answer)
    assert len(example.steps) == 4 and example.steps[1] == "0 0 6 4 9 0 ( 5 5 1 1 1 1 )"


def test_multiplication_answers_are_compared_by_digits(shared_data):
    task = Mult5x5(valid=str(shared_data / "mult5x5" / "valid.jsonl"))
    for example in task.examples("valid", limit=200):
        a, b = map(number, example.question.split(" * "))
        product = " ".join(reversed(f"{a * b:010d}"))
        assert task.is_correct(product, example.answer) and task.is_correct(product.replace(" ", ""), example.answer)
        assert not task.is_correct(product[:-1] + "x", example.answer)


def test_igsm_answers_are_numbers_modulo_23(shared_data):
    task = Igsm(valid=str(shared_data / "igsm" / "valid.jsonl"))
    assert {int(e.answer) for e in task.examples("valid")} <= set(range(23))
    assert task.is_correct(task.extract("so u = 15.\n### 15"), "15")


def test_phop_answers_follow_the_jumps(shared_data):
    task = PHop(valid=str(shared_data / "phop" / "valid.jsonl"))
    for example in task.examples("valid", limit=100):
        letters = example.question.split(": ")[1].split()
        at = len(letters) - 1
        for _ in range(example.meta["p"]):
            at = max(j for j in range(1, at + 1) if letters[j - 1] == letters[at])
        assert task.is_correct(task.extract(f"### {letters[at]}"), example.answer)
