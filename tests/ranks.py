"""What the tests have torchrun do, and torchrun itself as a subprocess.

torchrun --nproc-per-node 2 -m tests.ranks step FOLDER      a training step of every method: what it was, a file a rank
torchrun --nproc-per-node 2 -m tests.ranks cache 64 FLAGS   cache_embeddings.py with parts of 64 rows
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from models import METHODS
from utils.cli import run_script
from utils.distributed import joined, rank, share_of_rank, world_size
from utils.files import save_tensors

REPOSITORY = Path(__file__).resolve().parent.parent
DIM = 32
BATCHES = (37, 3)  # neither can be shared evenly by 2 or 4 ranks; of the smaller one, one of 4 has nothing


def random_pairs(batch):
    """Images and texts, (batch, DIM) each, the same in every process."""
    return torch.randn(2, batch, DIM, generator=torch.Generator().manual_seed(batch)).unbind()


def new_adaptor(method):
    """An untrained adaptor, the same in every process."""
    torch.manual_seed(0)
    return METHODS[method](DIM)


def steps(folder):
    """One step of every method as train.py does it; what it was goes into a file a rank."""
    found = {}
    with joined(torch.device("cpu")):
        for method in METHODS:
            for batch in BATCHES:
                adaptor = new_adaptor(method)
                optimizer, schedule = train.make_optimizer(adaptor, adaptor.recipes["small"], 10)
                pairs = [share_of_rank(z) for z in random_pairs(batch)]
                loss = train.step(adaptor, pairs, batch, optimizer, schedule, torch.float32)
                gradients = {name: parameter.grad for name, parameter in adaptor.named_parameters()}
                found[f"{method} {batch}"] = {"loss": loss, "share": len(pairs[0]), "gradients": gradients}
        save_tensors(found, Path(folder) / f"{rank()}-of-{world_size()}.pt")


def torchrun(ranks, *command, wait=True):
    """Start ranks with one thread each, in the current folder.

    Returns: the finished process with its output, or, unless wait, the running one.
    """
    arguments = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *map(str, command),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def ranks_of(process):
    """The process numbers of the ranks that a torchrun has started: {rank: number}."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = status.read_text().split("PPid:")[1].split()[0]
            environment = dict(
                entry.split(b"=", 1) for entry in (status.parent / "environ").read_bytes().split(b"\0") if b"=" in entry
            )
        except (OSError, IndexError):
            continue
        if parent == str(process.pid) and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(status.parent.name)
    return found


def wait_for(condition, process, seconds=120):
    """Wait until a condition holds while a process runs."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < end
        time.sleep(0.002)


def cache(part, *flags):
    """cache_embeddings.py with small parts."""
    import cache_embeddings
    from datasets import source

    source.UNIT = int(part)
    sys.exit(run_script(cache_embeddings.main, list(flags)))


if __name__ == "__main__":
    {"step": steps, "cache": cache}[sys.argv[1]](*sys.argv[2:])
