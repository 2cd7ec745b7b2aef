"""What a worker of phase 1 does in the tests; loaded quickly, as it loads little."""

import faulthandler
import os
import time

import fase1_descompresion as fase1


def convert(task: fase1.Task) -> fase1.Outcome:
    """Crash, hang, take long, or do as if all were well."""
    fase1.give_up_after(task.timeout_s, 0)
    if task.source.name == "crash":
        os.abort()
    if task.source.name == "hang":
        time.sleep(60)
    if task.source.name == "slow":
        time.sleep(1)
    faulthandler.cancel_dump_traceback_later()
    return fase1.Outcome(name=task.source.name)
