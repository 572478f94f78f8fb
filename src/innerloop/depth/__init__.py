"""Depth that varies from token to token: what the methods of the depth family are made of (docs/depth.md).

passes.py      packed tokens, a range of layers on some of them, f over tokens that end one by one
router.py      which tokens a block takes            recursion.py   a shared stack that tokens leave one by one
recurrence.py  a core's ramp and first states        decider.py     whether a token is read again, and as what
oracle.py      labels of a reference model           exits.py       what is learned at ways out
exit_pass.py   tokens that leave between two layers  lookup.py      keys of tokens that ended earlier
kv_sharing.py  whose keys stand for others           duo.py         attention over (position, depth)
tying.py       fewer layers made of many             residual_lora.py, prune.py   corrections; layers deleted
"""
