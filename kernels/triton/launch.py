"""Launches whose arguments but tensors and sizes are bound once: what Triton looks up for each launch, kept.

Triton finds a kernel's compilation by the types, alignment and values of all arguments, tens of microseconds a launch.
Where these cannot differ from one launch to the next, the first one's compilation is launched again, by the same
launcher of Triton's. Integers are not specialised in any kernel here; who binds a launch sees to types and alignment.
"""

from collections.abc import Callable
from typing import Any

import triton
from triton.runtime import driver

from . import common
from .configs import Config

_KNOWN = "3.9."  # the release whose launcher `_straight` knows


def device() -> object:
    """The current device, as Triton has it; None in the interpreter."""
    return None if common.interpreted() else driver.active.get_current_device()


def stream_of(device: object) -> Any:
    return None if device is None else driver.active.get_current_stream(device)


def watched() -> bool:
    """Whether somebody, such as a profiler, asked Triton to be called around every launch."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


class Bound:
    """A kernel with its constants, on one device, for arguments of the same types that begin at 16 bytes.

    Called with the grid's two sizes, the stream, and the kernel's arguments that are no constants, in their order.
    """

    def __init__(self, kernel, constants: dict[str, Any], config: Config, device: object):
        values = constants | config.tiles
        self._constants = tuple(values[name] for name in kernel.arg_names if name in values)
        self._kernel, self._options = kernel, {"num_warps": config.num_warps, "num_stages": config.num_stages}
        self._device = device
        assert kernel.arg_names[-len(self._constants) :] == [n for n in kernel.arg_names if n in values]

    def first(self, x: int, y: int, stream, *arguments) -> None:
        compiled = self._kernel[(x, y)](*arguments, *self._constants, **self._options)
        # The interpreter compiles nothing, and what is compiled for another machine is not launched.
        if compiled is not None and isinstance(self._device, int):
            self._compiled = compiled  # which unloads its module when it goes
            self.launch = _again(compiled, self._constants)

    launch: Callable[..., None] = first


def _again(compiled, constants: tuple) -> Callable[..., None]:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if triton.__version__.startswith(_KNOWN) and not _extra(compiled.metadata):
        return _straight(run, function, metadata, constants)

    def launch(x: int, y: int, stream, *arguments) -> None:
        run(x, y, 1, stream, function, metadata, None, None, None, *arguments, *constants)

    return launch


def _extra(metadata) -> bool:
    """Whether a launch needs memory beside its arguments, or a tool's own arguments."""
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    return bool(scratch or getattr(metadata, "tensordesc_meta", None) or getattr(metadata, "instrumentation_mode", ""))


def _straight(run, function, metadata, constants: tuple) -> Callable[..., None]:
    """Past the launcher's Python, which looks for all that a kernel has not; its own call is the same in a release."""
    call, kinds, signature = run.launch, run.arg_annotations, run.kernel_signature
    how = (
        function,
        run.launch_cooperative_grid,
        run.launch_pdl,
        metadata,
        None,
        None,
        None,
        None,
        None,
        kinds,
        signature,
    )

    def launch(x: int, y: int, stream, *arguments) -> None:
        call(x, y, 1, stream, *how, arguments + constants)

    return launch
