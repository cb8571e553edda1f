"""A SLURM of this machine: munge, a controller and one node, with files of their own, for as long as a test needs it.

with Cluster(folder) as cluster: ...      # its programs find it by cluster.environment
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sacct", "scontrol")
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
AccountingStorageType=accounting_storage/none
KillWait=5
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> str | None:
    """Why no cluster can be here; None if one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if lacking:
        return f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


class Cluster:
    def __init__(self, folder: Path):
        self.folder, self.started = folder, []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self):
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        host, folder = socket.gethostname().split(".")[0], self.folder
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(parents=True, mode=0o755)
        values = dict(host=host, ports=_free_ports(), user=getpass.getuser(), folder=folder, cpus=os.cpu_count())
        (folder / "slurm.conf").write_text(_CONF.format(**values))
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *paths)
        self._until(lambda: (folder / "munge" / "socket").exists(), "munged")
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D", "-N", host)
        self._until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "the node")

    def __exit__(self, *_):
        for process in reversed(self.started):
            process.terminate()
        for process in reversed(self.started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, program: str, *arguments: str) -> None:
        path = shutil.which(program) or f"/usr/sbin/{program}"
        log = (self.folder / f"{program}.out").open("w")
        self.started.append(subprocess.Popen([path, *arguments], env=self.environment, stdout=log, stderr=log))

    def _until(self, ready, what: str) -> None:
        end = time.monotonic() + 60
        while not ready():
            if time.monotonic() > end or any(process.poll() is not None for process in self.started):
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
                raise RuntimeError(f"{what} does not start: {logs}")
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def ended(self, job: str, seconds: float = 240) -> dict[str, str]:
        """{task: state} of a job, or of an array's tasks, when all have ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            states = self.states(job)
            if states and not set(states.values()) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}:
                return states
            time.sleep(0.3)
        raise TimeoutError(f"job {job} is still {self.states(job)}")

    def states(self, job: str) -> dict[str, str]:
        lines = self.ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)


def _free_ports() -> list[int]:
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [one.getsockname()[1] for one in found]
    for one in found:
        one.close()
    return ports
