"""Runs of the command line that may be killed, each in a fork of one process that has imported torch already.

    with Forks() as forks:
        code = forks.run(["embed", ...], patch="os.fsync", at=3, how="kill before")

The process behind it runs nothing itself, so that no thread is lost in a fork.
"""

import json
import os
import resource
import subprocess
import sys


class Forks:
    def __enter__(self):
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def start(self, arguments, **how) -> int:
        """patch: a function of os; at: which of its calls, from 1; how: "kill before", "kill after". Returns a pid.

        streams: {name: how `_break` breaks it}; room: MiB of memory it may take beside what it has; largest: the most
        bytes of a file.
        """
        how = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in how.items()}
        return self._ask({"arguments": [str(a) for a in arguments]} | how)

    def wait(self, pid: int) -> int:
        """The exit code, or minus the number of the signal."""
        return self._ask({"wait": pid})

    def run(self, arguments, **how) -> int:
        return self.wait(self.start(arguments, **how))

    def _ask(self, question: dict) -> int:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


def _serve() -> None:
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                os._exit(_child(**question))
        print(answer, flush=True)


def _child(
    arguments, patch=None, at=0, how="", environ=None, stdin=None, log=os.devnull, streams=None, room=0, largest=0
) -> int:
    from esm_fast.cli import main

    os.environ.update(environ or {})
    if stdin:
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    for name, how_it_is in (streams or {}).items():
        _break(name, how_it_is)
    if room:
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20),) * 2)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if patch:
        setattr(os, patch, _killing(getattr(os, patch), at, how))
    try:
        return main(arguments)
    except SystemExit as error:
        return error.code
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()


def _break(name: str, how: str) -> None:
    """stdin, stdout or stderr as Python finds it at its start: "closed", "full", "unheard", or in that encoding."""
    number = ("stdin", "stdout", "stderr").index(name)
    if how == "closed":
        setattr(sys, name, None)
        os.close(number)
    elif how == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC), number)
    elif how == "unheard":
        read, write = os.pipe()
        os.dup2(write, number)
        os.close(read)
        os.close(write)
    else:
        setattr(sys, name, open(os.dup(number), "w", encoding=how))  # noqa: SIM115


def _killing(real, at, how):
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == at and how == "kill before":
            os.kill(os.getpid(), 9)
        result = real(*arguments, **options)
        if calls == at:
            os.kill(os.getpid(), 9)
        return result

    return call


if __name__ == "__main__":
    sys.path.pop(0)  # tests/
    import torch
    import torch.distributed.tensor  # what the first parameter imports

    # What a command imports on its way, or each fork would: pandas is what pyarrow asks for.
    from esm_fast import _C
    from esm_fast.dataset import compute, layout, planner, verify, worker  # noqa: F401
    from esm_fast.inference import load  # noqa: F401
    from esm_fast.ops import registry

    layout.pa.array([b""])
    registry.backends()
    torch.set_num_threads(1)
    _C.set_threads(1)
    _serve()
