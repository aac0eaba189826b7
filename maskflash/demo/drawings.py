"""The demo's mask -> the files that show it: a picture, and a page to explore."""

from importlib.util import find_spec
from pathlib import Path

import maskflash as mf
from maskflash import visualize
from maskflash.demo.documents import Packed
from maskflash.demo.workload import packed
from maskflash.errors import ArgumentError


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


def draw(documents: Packed, folder: Path) -> dict[str, str | None]:
    """Write the mask of packed documents as a picture and as a page.

    Returns:
        The files: "picture", pairs beside tiles (None where matplotlib isn't installed), and "explorer".
    """
    tokens = len(documents.tokens)
    explorer, picture = folder / "explorer.html", folder / "mask.png"
    title = f"causal attention inside {len(documents.lengths)} packed documents"
    visualize.explorer(packed, tokens, tokens, path=explorer, title=title, doc=documents.ids)
    if find_spec("matplotlib") is None:
        return {"picture": None, "explorer": str(explorer)}
    tiles = packed.block_map(tokens, tokens, doc=documents.ids)
    panels: dict[str, mf.Mask | mf.BlockMap] = {"pairs": packed, "tiles": tiles}
    visualize.side_by_side(panels, tokens, tokens, doc=documents.ids).savefig(picture)
    return {"picture": str(picture), "explorer": str(explorer)}
