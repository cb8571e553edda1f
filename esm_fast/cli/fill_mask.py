"""esm-fast fill-mask: the most probable residues at each <mask>."""

import argparse
import json

from .common import InputError, add_model, dtype_of, load_model, positive

NAME = "fill-mask"
ORDER = 21
HELP = "the most probable residues at <mask>"
DESCRIPTION = """\
Predicts the residues at each <mask> of a sequence, as the model card's example does. With --json
the output has the form of a Hugging Face fill-mask pipeline: a list of predictions, or for several
masks a list of such lists."""
EXAMPLES = """\
  esm-fast fill-mask 'QERLKSIVRILE<mask>SLGYNIVAT' --model esm1b_t33_650M_UR50S
  esm-fast fill-mask 'MK<mask>AY<mask>AKQR' --top 3 --json

Quote the sequence: the shell reads < and > itself.
"""
_MASK = "<mask>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sequence", metavar="SEQUENCE", help="residues with one <mask> or several, in quotes")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="predictions a mask (default: 5)")
    parser.add_argument("--json", action="store_true", help="write JSON")
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    ids = _encode(args.sequence)
    dtype = dtype_of(args)
    model = load_model(args.model, device=args.device, dtype=dtype, backend=args.backend, threads=args.threads)
    if model.lm_head is None:
        raise InputError(f"{args.model} has no language-model head, so it cannot fill masks")
    if len(ids) > model.config.limit("error"):
        raise InputError(f"the sequence has {len(ids)} residues; this model takes {model.config.max_residues}")
    masks = _predict(model, ids, args.top)
    if args.json:
        print(json.dumps([found for _, found in masks] if len(masks) > 1 else masks[0][1], indent=2))
        return
    for position, found in masks:
        print(f"residue {position}")
        for prediction in found:
            print(f"  {prediction['score']:.4f}  {prediction['token']:2}  {prediction['token_str']}")


def _encode(sequence: str):
    from ..alphabet import MASK
    from ..sequences.fasta import FastaError, records_from
    from ..sequences.tokenize import Policy, Report, tokenize

    records = next(records_from([("SEQUENCE", sequence)]))
    try:
        ids = tokenize(records, Policy(max_residues=len(sequence) + 1), Report()).ids
    except FastaError as error:
        raise InputError(str(error).split("; use ")[0]) from None
    if not (ids == MASK).any():
        raise InputError(f"the sequence has no {_MASK}; put one in, in quotes: 'QERLKSIVRILE{_MASK}SLGYNIVAT'")
    return ids


def _predict(model, ids, top: int) -> list[tuple[int, list[dict]]]:
    """Per mask its residue number, and predictions with the keys of Hugging Face's pipeline."""
    import numpy as np
    import torch

    from ..alphabet import MASK, TOKENS
    from ..sequences.batching import pack

    batch = pack(ids, np.array([0]), np.array([len(ids)]), np.array([0]))
    with torch.inference_mode():
        logits = model.forward_packed(batch.to(model.device), logits=True).logits
    tokens = [TOKENS[i] for i in ids]
    masks = []
    for place in np.flatnonzero(ids == MASK).tolist():
        best = logits[place + 1].float().softmax(-1).topk(min(top, len(TOKENS)))
        found = []
        for score, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            filled = " ".join([*tokens[:place], TOKENS[token], *tokens[place + 1 :]])
            found.append({"score": score, "token": token, "token_str": TOKENS[token], "sequence": filled})
        masks.append((place + 1, found))
    return masks
