"""accelerate: models of transformers or fair-esm that a user already has, made to compute packed in place.

A model's class is exchanged for a subclass with another forward (`hf`, `fair_esm_host`); parameters, buffers,
state_dict and configuration stay the same objects. Neither package is imported unless the model came from it.
"""

import importlib

from torch import nn

from ..models.family import families, titles
from ..ops.registry import require_backend
from .shared import PackedEncoder, examine

# Original class -> our subclass. Its module imports the other package, so it is imported only when it is needed.
_APIS = {
    ("transformers.models.esm.modeling_esm", "EsmModel"): ("hf", "EsmModel"),
    ("transformers.models.esm.modeling_esm", "EsmForMaskedLM"): ("hf", "EsmForMaskedLM"),
}
for _family in families().values():
    _module, _, _name = _family.fair_esm_class.partition(":")
    _APIS[_module, _name] = "fair_esm_host", _name
_OTHER_FAMILIES = {"MSATransformer": "the MSA transformer", "GVPTransformerModel": "ESM-IF1"}


def accelerate(model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """Makes every encoder inside a model compute packed, without padding. The weights stay where they are.

    Undone by `unaccelerate`. Where attention_mask is 0 (or, for fair-esm, at <pad>) hidden states are 0, so give such
    tokens the label -100. A call that cannot run packed runs on the original code, and a warning says why.

    Args:
        model: transformers' EsmModel, or any module that holds one (EsmForMaskedLM, EsmForSequenceClassification,
            EsmForTokenClassification, your own); or fair-esm's model, or any module that holds one.
        backend: name of the backend for every op it implements, or None for the best one that can run.

    Returns:
        model itself. Calling again changes nothing but the backend.

    Raises:
        TypeError: no such encoder inside. ValueError: there is one that cannot be packed; the message says why, and
        nothing was changed.
    """
    require_backend(backend)
    apis = [(module, api) for module in model.modules() if (api := _api(type(module))) is not None]
    encoders = [module for module, api in apis if issubclass(api, PackedEncoder)]
    if not encoders:
        raise TypeError(_no_encoder(model))
    for module, api in apis:
        if issubclass(api, PackedEncoder):
            examine(module, api.esm_fast_layout)
    for module, api in apis:
        module.__class__ = api
    for module in encoders:
        module.esm_fast_backend = backend
    return model


def unaccelerate(model: nn.Module) -> nn.Module:
    """Gives what was accelerated in a model the classes of its own package again, and returns the model."""
    for module in model.modules():
        if _is_ours(type(module)):
            module.__dict__.pop("esm_fast_backend", None)
            module.__class__ = next(kind for kind in type(module).__mro__ if _key(kind) in _APIS)
    return model


def _key(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _is_ours(kind: type) -> bool:
    return _key(kind) in {(f"{__package__}.{module}", name) for module, name in _APIS.values()}


def _api(kind: type) -> type | None:
    """Our class for an original one, itself for ours, None for any other: a subclass may compute something else."""
    if _is_ours(kind):
        return kind
    if _key(kind) not in _APIS:
        return None
    module, name = _APIS[_key(kind)]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def _no_encoder(model: nn.Module) -> str:
    names = {type(module).__name__ for module in model.modules()}
    others = " and ".join(sorted(_OTHER_FAMILIES[name] for name in names & _OTHER_FAMILIES.keys()))
    classes = " or ".join(family.fair_esm_class.rpartition(":")[2] for family in families().values())
    return (
        f"accelerate needs one of {titles()}: transformers' EsmModel, fair-esm's {classes}, or a module that "
        f"holds one; {type(model).__name__} holds {others or 'none'}"
    )
