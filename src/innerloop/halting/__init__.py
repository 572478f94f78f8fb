"""When has a state been refined enough? One catalogue of stop rules for every loop (halting.md; slr.md, section 6).

Every score grows as the loop converges, and a row stops once its score has reached the threshold for long enough; so an
infinite threshold never stops. A row is a block of latents, or a single token of a pass: the rules do not know.

    states.py    what the states say          words.py       what the words say that they show
    learned.py   gates and probes             classifier.py  fitted to statistics
    rule.py      `StopRule`, all of them      baselines.py   fixed and random depths
    evidence.py  what a rule may look at      controller.py  which rows of a running loop end

Shapes: `B` rows, `N` positions, `D` width, `V` vocabulary, `T` iterations; scores are (B,) in fp32.
"""
