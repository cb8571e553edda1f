"""What the benches share: they can import their neighbours, and their results name the machine they were made on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one are no package


def pytest_benchmark_update_machine_info(config, machine_info):
    from machine import machine

    machine_info["esm_fast"] = machine()
