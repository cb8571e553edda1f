"""Chains of PDB and mmCIF files, plain or gzipped, read by gemmi: sequence, and where each residue's C-beta is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

NEAR = 8.0  # Angstrom between C-beta atoms: closer is a contact
BOND = 2.0  # Angstrom between C and the next N: farther apart, residues are missing between them
_ENDINGS = (".pdb", ".ent", ".cif", ".mmcif")
_MOST_MISSING = 300  # residues in a gap; numbers that jump farther are another numbering


class StructureError(ValueError):
    """A file that has no usable protein chain, or cannot be read; the message names it."""


class NoProteinError(StructureError):
    """A file that can be read and has no protein chain that is long enough."""


@dataclass
class Structure:
    """A chain. sequence: of the construct where the file says it (SEQRES), else of the residues that were seen, with X
    for each that is missing by the numbers where the chain is broken; beta: (residues, 3) in Angstrom, NaN where
    nothing was seen."""

    name: str
    sequence: str
    beta: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """(residues,) bool."""
        return ~np.isnan(self.beta[:, 0])

    @property
    def contacts(self) -> np.ndarray:
        """(residues, residues) bool: both were seen, and are less than 8 Angstrom apart."""
        with np.errstate(invalid="ignore"):
            return np.linalg.norm(self.beta[:, None] - self.beta[None], axis=-1) < NEAR

    @property
    def truth(self) -> np.ndarray:
        """(residues, residues): 1 where residues touch, 0 where not, NaN where one was not seen."""
        return np.where(self.seen[:, None] & self.seen[None], self.contacts, np.nan)


def is_structure(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(_ENDINGS)


def read_structures(path: str | Path, least: int = 20) -> list[Structure]:
    """The protein chains of a file, with at least so many residues seen; of the first model.

    Raises:
        StructureError: for a file that cannot be read; NoProteinError: for one that has no such chain.
        FileNotFoundError. ImportError: without gemmi (the extra `contacts`).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    import gemmi

    try:
        read = gemmi.read_structure(str(path))
        read.setup_entities()
        read.assign_label_seq_id()
    except Exception as error:  # gemmi raises many types for what it cannot read
        raise StructureError(f"{path} cannot be read as PDB or mmCIF: {str(error)[:200]}") from None
    name, found = path.name.split(".")[0], []
    for chain in read[0] if len(read) else ():
        polymer = chain.get_polymer()
        if len(polymer) and polymer.check_polymer_type() == gemmi.PolymerType.PeptideL:
            structure = _chain(f"{name}:{chain.name}", polymer, read.get_entity_of(polymer))
            if structure.seen.sum() >= least:
                found.append(structure)
    if not found:
        raise NoProteinError(f"{path} has no protein chain with {least} residues or more")
    return found


def files_of(path: str | Path) -> list[Path]:
    """The PDB and mmCIF files of a folder; a file is itself. Raises StructureError for a folder without any."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    if not (files := [file for file in sorted(path.iterdir()) if is_structure(file)]):
        raise StructureError(f"{path} holds no PDB or mmCIF files")
    return files


def _chain(name: str, polymer, entity) -> Structure:
    import gemmi

    residues = list(polymer.first_conformer())
    if entity is not None and entity.full_sequence and all(residue.label_seq for residue in residues):
        names = [gemmi.Entity.first_mon(item) for item in entity.full_sequence]
        places = [residue.label_seq - 1 for residue in residues]
    else:
        gaps = [_missing(*pair) for pair in zip(residues, residues[1:], strict=False)]
        places = [at + before for at, before in enumerate(np.cumsum([0, *gaps])[: len(residues)].tolist())]
        names = ["UNK"] * (places[-1] + 1)
        for place, residue in zip(places, residues, strict=True):
            names[place] = residue.name
    beta = np.full((len(names), 3), np.nan)
    for place, residue in zip(places, residues, strict=True):
        if 0 <= place < len(beta):
            beta[place] = _beta(residue)
    return Structure(name, "".join(map(_letter, names)), beta)


def _missing(first, second) -> int:
    """Residues between two that follow each other in a file: by their numbers, where no bond joins them."""
    between = second.seqid.num - first.seqid.num - 1
    ends = [{atom.name: np.array(atom.pos.tolist()) for atom in residue} for residue in (first, second)]
    if not 0 < between <= _MOST_MISSING or "C" not in ends[0] or "N" not in ends[1]:
        return 0
    return between if np.linalg.norm(ends[0]["C"] - ends[1]["N"]) > BOND else 0


def _letter(name: str) -> str:
    import gemmi

    letter = gemmi.find_tabulated_residue(name).one_letter_code.strip().upper()
    return letter if letter.isalpha() else "X"


def _beta(residue) -> np.ndarray:
    """C-beta; of glycine and where it is missing, where N, C-alpha and C say that it would be."""
    atoms = {atom.name: np.array(atom.pos.tolist()) for atom in residue}
    if "CB" in atoms:
        return atoms["CB"]
    if not {"N", "CA", "C"} <= set(atoms):
        return np.full(3, np.nan)
    b, c = atoms["CA"] - atoms["N"], atoms["C"] - atoms["CA"]
    return -0.58273431 * np.cross(b, c) + 0.56802827 * b - 0.54067466 * c + atoms["CA"]
