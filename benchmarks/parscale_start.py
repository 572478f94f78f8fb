"""What prefixes cost a trained decoder before anything has been learnt: its accuracy and loss behind fresh ones.

innerloop train recipes/chain/parscale.yaml
python benchmarks/parscale_start.py runs/chain-parscale/stages/1 --out benchmarks/results/parscale_start.json
"""

from itertools import product

import record
import torch

from innerloop import Cot, LatentModel, Method, ParScale
from innerloop.measure import evaluate
from innerloop.tasks import Chain

N = 200
LENGTHS, BIASES, STREAMS = (1, 4, 8, 48), (0.0, -4.0, -8.0), (2, 4)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("model", help="a chain-of-thought run on chains of three operations modulo five")
    options = record.begin(parser)
    n = 4 if options.smoke else N
    points = [{"method": "cot", **measured(options, Cot(), n)}]
    for streams, n_prefix, bias in product(STREAMS, LENGTHS, BIASES):
        method = ParScale(streams=streams, n_prefix=n_prefix, prefix_bias=bias)
        found = measured(options, method, n)
        points.append({"method": "parscale", "streams": streams, "n_prefix": n_prefix, "bias": bias, **found})
        print(points[-1])
    record.write(options, "parscale_start", {"n": n, "points": points})


@torch.no_grad()
def measured(options, method: Method, n: int) -> dict[str, float]:
    """Return the accuracy and the loss of a run's decoder under a method whose parts are fresh."""
    torch.manual_seed(options.seed)
    model = LatentModel.from_pretrained(options.model, method, device=options.device, chat=False)
    task = Chain(n_ops=3, modulus=5, n_train=5000, n_valid=100, n_test=500)
    examples = task.examples("test", n)
    found = evaluate(model, task, examples)
    return {"accuracy": sum(one.correct for one in found) / n, "loss": float(model.loss(examples).loss)}


if __name__ == "__main__":
    main()
