"""Forks of this process, alone or as ranks, and torchrun, which imports torch anew in every rank.

torchrun --nproc-per-node 2 -m tests.ranks 64 FLAGS   cache_embeddings.py with parts of 64 rows
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import cache_embeddings
import train
from datasets import source
from models import GROUPS, METHODS
from tests.conftest import recipe_of
from utils.cli import run_script
from utils.distributed import joined, rank, share_of_rank, world_size

REPOSITORY = Path(__file__).resolve().parent.parent
DIM = 32
LIMIT = 60  # seconds, after which a fork hangs
STEPPED = (  # every way to be encoded
    *(*GROUPS["all"], "asymvlm-psd-both", "asymvlm-psd-image", "asymvlm-vmf-frozen"),
)
BATCHES = (
    37,
    3,
)  # neither can be shared evenly by 2 or 4 ranks; of the smaller one, one of 4 has nothing


def random_pairs(batch):
    """Images and texts, (batch, DIM) each, the same in every process."""
    return torch.randn(2, batch, DIM, generator=torch.Generator().manual_seed(batch)).unbind()


def new_adaptor(method):
    """An untrained adaptor, the same in every process."""
    torch.manual_seed(0)
    return METHODS[method](DIM)


def steps(argv):
    """One step of every way to be encoded, as train.py does it.

    Args: argv: the folder to which a file goes of what it was.
    """
    found, folder = {}, Path(*argv)
    with joined(torch.device("cpu")):
        for method in STEPPED:
            for batch in BATCHES:
                adaptor = new_adaptor(method)
                optimizer, schedule = train.make_optimizer(
                    adaptor, adaptor.recipes[recipe_of(method)], 10
                )
                pairs = [share_of_rank(z) for z in random_pairs(batch)]
                loss, _ = train.step(adaptor, pairs, batch, optimizer, schedule, torch.float32)
                gradients = {name: parameter.grad for name, parameter in adaptor.named_parameters()}
                found[f"{method} {batch}"] = {
                    "loss": loss,
                    "share": len(pairs[0]),
                    "gradients": gradients,
                }
                found[f"{method} {batch}"]["buffers"] = dict(adaptor.named_buffers())
        torch.save(found, folder / f"{rank()}-of-{world_size()}.pt")


def start(main, argv, sabotage=lambda: None, output="output.txt"):
    """Call main(argv) as a script does, in a fork. Args: output: file for what it says. Returns: its process id."""
    torch.optim.SGD(
        [torch.zeros(1)]
    )  # the first optimiser imports a thousand modules: once, and not in every fork
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        status = 99
        try:
            sys.stdout = sys.stderr = open(output, "w")  # noqa: SIM115  ends with the process
            torch.set_num_threads(1)  # the threads of this process did not come along
            sabotage()
            status = run_script(main, [str(word) for word in argv])
        except BaseException:  # noqa: BLE001  whatever it is, it is a finding
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return process


def finish(process, seconds=LIMIT):
    """Wait for a process, and kill it when its time is up.

    Returns: exit status, or None if it was killed, here or by itself.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


class Ranks:
    """Ranks forked from this process, in the current folder; as a context it leaves none running.

    Args:
        ranks: how many.
        main, argv: what each of them calls as a script does. It joins the others by itself, with `joined`.
        script: by which name they speak.
    """

    def __init__(self, ranks, main, argv=(), script="test"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
                "WORLD_SIZE": str(ranks),
            }

        def be(rank):
            sys.argv = [script]
            os.environ.update(where | {"RANK": str(rank)})

        self.folder = tempfile.TemporaryDirectory()  # of what they say
        self.files = [Path(self.folder.name, f"rank{rank}.txt") for rank in range(ranks)]
        starts = [
            (main, argv, functools.partial(be, rank), file) for rank, file in enumerate(self.files)
        ]
        self.numbers = [start(*arguments) for arguments in starts]
        self.statuses = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.folder.cleanup()

    def wait(self, seconds=LIMIT):
        """Wait for all ranks, and kill those whose time is up.

        Returns: their exit statuses, None of those that were killed, here or by themselves.
        """
        end = time.monotonic() + seconds
        for index, number in enumerate(self.numbers):
            self.statuses[index] = finish(number, max(1, end - time.monotonic()))
        return list(self.statuses.values())

    def kill(self):
        """Kill the ranks that have not been waited for. Returns: the signals that ended them, 0 if they had ended."""
        left = [index for index in range(len(self.numbers)) if index not in self.statuses]
        for index in left:
            os.kill(self.numbers[index], signal.SIGKILL)
        found = [os.waitpid(self.numbers[index], 0)[1] for index in left]
        self.statuses |= dict.fromkeys(left)
        return [os.WTERMSIG(status) for status in found]

    def output(self):
        """What the ranks have said, one after the other."""
        return "\n".join(file.read_text() for file in self.files)


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
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
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
                entry.split(b"=", 1)
                for entry in (status.parent / "environ").read_bytes().split(b"\0")
                if b"=" in entry
            )
        except (OSError, IndexError):
            continue
        if parent == str(process.pid) and b"RANK" in environment:
            found[int(environment[b"RANK"])] = int(status.parent.name)
    return found


def wait_for(condition, process=None, seconds=120):
    """Wait until a condition holds, while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def cache(argv):
    """cache_embeddings.py with small parts. Args: argv: their rows, and its flags."""
    source.UNIT = int(argv[0])
    cache_embeddings.main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(run_script(cache, sys.argv[1:]))
