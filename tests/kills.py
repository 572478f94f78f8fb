"""Kills at every step at which a folder changes: from then on nothing changes, as if the process were gone."""

import os
from collections.abc import Callable

import pytest

STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "link")


class Killed(BaseException):
    """What no clean-up survives."""


def killed_at(step: int, does: Callable[[], object]) -> bool:
    """Run something that dies just before its step-th change to a folder; tell whether it died."""
    left = [step]

    def counted(call):
        def changes(*args, **options):
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return call(*args, **options)

        return changes

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            does()
        except Killed:
            return True
    return False
