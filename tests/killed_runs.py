"""Run by test_train_resume.py: trains in child processes that are killed at random moments, and
again until one ends.

The recipe saves after every step, so that many of the moments lie within the writing of a
checkpoint. Writes how many children died, and how many of them in the middle of a write.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401 once here, not in every child
from saezoo_train import train_sae
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

torch.set_num_threads(1)


def child(recipe: dict, out: Path) -> int:
    """Train in a process of its own; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        train_sae(recipe, out)
    except BaseException as error:
        sys.stderr.write(f"child: {error!r}\n")
        os._exit(1)
    os._exit(0)


def half_written(folder: Path) -> bool:
    """Whether a checkpoint is being written there."""
    return folder.is_dir() and any(name.startswith(".checkpoint-") for name in os.listdir(folder))


def saved(folder: Path) -> int:
    """The step of the newest whole checkpoint there; 0 without one."""
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name[11:]) for name in names if name.startswith("checkpoint-")), default=0)


def main(recipe: dict, out: Path, kills: int) -> None:
    """Kill that many children, each some random steps after it began, and every other one just then
    only when it writes a checkpoint. Steps, not seconds: on any machine the moments come before the
    run's end.
    """
    draw, run, died, within = random.Random(1), out.with_name(out.name + ".run"), 0, 0
    while True:
        pid = child(recipe, out)
        enough = saved(run) + draw.randrange(1, 7)
        ended, status = 0, 0
        while not ended:
            time.sleep(0.0005)
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = saved(run) >= enough
            if not ended and died < kills and late and (died % 2 or half_written(run)):
                os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        died += 1
        within += half_written(run)
    sys.stdout.write(json.dumps({"died": died, "within": within}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
