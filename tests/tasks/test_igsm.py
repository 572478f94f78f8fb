from innerloop.tasks import Igsm


def test_igsm_answers_are_numbers_modulo_23(shared_data):
    task = Igsm(valid=str(shared_data / "igsm" / "valid.jsonl"))
    assert {int(e.answer) for e in task.examples("valid")} <= set(range(23))
    assert task.is_correct(task.extract("so u = 15.\n### 15"), "15")
