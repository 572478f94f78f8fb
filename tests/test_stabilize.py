from tests.models import ARCHS, tiny_model, tiny_lm, chain_examples
from innerloop import Coconut
import pytest, torch
@pytest.mark.parametrize("a", ARCHS)
def test_x(a):
    m = tiny_model(Coconut(), a)
    out = m.loss(list(chain_examples(8,3)))
    out.loss.backward()
    print(out.loss)
    tiny_lm(a)
