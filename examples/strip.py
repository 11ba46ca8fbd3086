"""Joins parts of three pictures of docs/pictures into the strip at the top of README.md.

    python examples/strip.py            # leaves strip.png in out/
    python examples/strip.py --smoke    # the same, in a temporary folder

The parts: two guides of eight schools (eight_schools.py), a conditional density (quickstart.py), and data of the plane
beside their flows (gallery.py).
"""

from pathlib import Path

from _script import begin
from PIL import Image

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
HEIGHT, GAP = 300, 24
# The picture, and left, top, right and bottom of the part as shares of its sides.
PARTS = {
    "schools": ("guides_schools.png", (0, 0.08, 0.515, 1)),
    "conditional": ("quickstart_conditional.png", (0, 0, 0.5, 1)),
}
CELLS = [
    ("gallery.png", (left, top, left + 0.136, top + 0.1165)) for top in (0.3985, 0.64) for left in (0.0243, 0.7225)
]


def part(name: str, box: tuple[float, ...]) -> Image.Image:
    """A part of a stored picture on white."""
    with Image.open(PICTURES / name) as stored:
        picture = stored.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB").crop(
        tuple(round(share * side) for share, side in zip(box, picture.size * 2, strict=True))
    )


def scaled(picture: Image.Image, height: int) -> Image.Image:
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)


def main() -> None:
    out = begin(__doc__).out
    cell = (HEIGHT - GAP) // 2
    cells = [part(*place).resize((cell, cell), Image.Resampling.LANCZOS) for place in CELLS]
    square = Image.new("RGB", (HEIGHT, HEIGHT), "white")
    for k, picture in enumerate(cells):
        square.paste(picture, (k % 2 * (cell + GAP), k // 2 * (cell + GAP)))
    parts = [*(scaled(part(*place), HEIGHT) for place in PARTS.values()), square]
    strip = Image.new("RGB", (sum(p.width for p in parts) + GAP * (len(parts) - 1), HEIGHT), "white")
    left = 0
    for picture in parts:
        strip.paste(picture, (left, 0))
        left += picture.width + GAP
    path = out / "strip.png"
    strip.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
