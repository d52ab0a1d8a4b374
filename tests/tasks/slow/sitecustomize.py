"""Makes every encoding take half a second, so that a test can interrupt a run in between.

`SLOW_UNTIL` in the environment names a file that the first process of several waits for besides.

Python imports this by itself where its folder is on the path.
"""

import importlib.abc
import os
import sys
import time
from importlib.machinery import PathFinder


class _Slow(importlib.abc.MetaPathFinder):
    """Replaces `Backbone.encode_image` as soon as its module has been run."""

    def find_spec(self, name, path, target=None):
        if name != "surgery.backbone":
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def run_and_slow_down(module):
            run(module)
            module.Backbone.encode_image = slow(module.Backbone.encode_image)

        spec.loader.exec_module = run_and_slow_down
        return spec


def slow(encode):
    rank = os.environ.get("LOCAL_RANK", "0")
    awaited = os.environ.get("SLOW_UNTIL") if rank == "0" else None

    def later(*args):
        while awaited and not os.path.exists(awaited):
            time.sleep(0.05)
        time.sleep(6 if awaited else 0.5)  # 6: longer than Lightning takes to see a rank end
        return encode(*args)

    return later


sys.meta_path.insert(0, _Slow())
