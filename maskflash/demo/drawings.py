"""The demo's mask -> the files that show it: a picture, and a page to explore."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import maskflash as mf
from maskflash import visualize
from maskflash.demo.documents import Packed
from maskflash.demo.workload import packed
from maskflash.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Drawings:
    """What was written.

    Attributes:
        picture: a PNG of pairs beside tiles; None where matplotlib isn't installed.
        explorer: an HTML file.
    """

    picture: Path | None
    explorer: Path

    def to_dict(self) -> dict[str, str | None]:
        """The files' names."""
        return {"picture": str(self.picture) if self.picture else None, "explorer": str(self.explorer)}

    def __str__(self) -> str:
        picture = self.picture or "none: it needs matplotlib, pip install 'maskflash[plot]'"
        return f"picture   {picture}\nexplorer  {self.explorer}  (open it in a browser)"


def make_folder(folder: Path) -> None:
    """Make the folder that files go to.

    Raises:
        ArgumentError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"demo: can't make the folder {folder} ({error.strerror}); choose another with --output, or --no-output"
        ) from None


def draw(documents: Packed, folder: Path) -> Drawings:
    """Write the mask of packed documents as a picture and as a page."""
    tokens = len(documents.tokens)
    explorer, picture = folder / "explorer.html", folder / "mask.png"
    title = f"causal attention inside {len(documents.lengths)} packed documents"
    visualize.explorer(packed, tokens, tokens, path=explorer, title=title, doc=documents.ids)
    if find_spec("matplotlib") is None:
        return Drawings(None, explorer)
    panels: dict[str, mf.Mask | mf.BlockMap] = {
        "pairs": packed,
        "tiles": packed.block_map(tokens, tokens, doc=documents.ids),
    }
    visualize.side_by_side(panels, tokens, tokens, doc=documents.ids).savefig(picture)
    return Drawings(picture, explorer)
